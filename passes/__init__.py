"""The compiler's passes, in order. Each is a module with `NAME`, `run(gm, context)` and, as its contract, `check(gm, context)`.

    joint graph           merge    several reads of one parameter become one gather and one reduce
                          tag      nothing derived from a gather is saved for backward
    forward, backward,    bucket   semantic ops of one unit become one message
    inference graph       lower    semantic ops become hops
                          quantize what stands between two quantised hops becomes one kernel
                          schedule hops are under way while the graph computes
                          pin      the order of the collectives is fixed, and checked in the generated code
                          verify   the invariants

`runner.run` times each, checks its contract and hands before and after to the dump.
"""

from zcompile.passes import bucket, lower, merge, pin, quantize, schedule, tag, verify

JOINT = (merge, tag)
LOWERED = (bucket, lower, quantize, schedule, pin, verify)

__all__ = ["JOINT", "LOWERED"]
