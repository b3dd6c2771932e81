"""The planner: what a model computes (workload), a plan's graphs without tracing (skeleton), a whole step (step), the choice (search)."""
