"""What happens when a rank dies, stops, fails or stays behind: every other rank ends in time, and one report says who, where and why.

sites.py      which collective of this rank this is: level, transfer, number, parameters, source line
flight.py     one collective under way, and what its wait raises
waits.py      waiting for gloo's works, and asking which connections are closed
board.py      what the ranks leave for one another in the job's store
watch.py      the thread that publishes, asks, reports, and ends a process that cannot end itself
verdict.py    from what all ranks said to who is to blame: a pure function
errors.py     what an error says of itself, and whether another rank is behind it
memory.py     by whom memory is taken, for a rank that ran out of it
checksums.py  what was sent is what arrived (option checks="checksums")
"""
