"""`zcompile doctor`: is this job started as the machine's makers advise, do its communicators answer?

recording.py      what is looked at: what each rank and host says of itself; can be saved, read back, and judged elsewhere
findings.py       what comes of a look: status, what was seen, what is right, advice and its source
launch.py         rules: launcher, core binding, devices, topology
network.py        rules: network variables, plugin, cache monitor
versions.py       rules: torch, Triton, ROCm, equal on all ranks
communicators.py  every communicator, one by one, with a time limit and a check of what arrives
command.py        the command: table, JSON, exit code
"""
