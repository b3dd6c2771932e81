"""What happens when a rank dies, stops, fails or stays behind: every other rank ends in time, and one report says who, where and why.

sites.py    which collective of this rank this is: level, transfer, number, parameters, source line
board.py    what the ranks leave for one another in the job's store
verdict.py  from what all ranks said to who is to blame: a pure function
watch.py    the thread that publishes, asks, reports, and ends a process that cannot end itself
memory.py   what memory is taken by, for a rank that ran out of it
checksums.py what was sent is what arrived (option checks="checksums")
"""
