"""Runs are killed, disks fail, files rot, strangers send folders: here it is done on purpose, and counted.

A promise that nothing is lost is worth what was tried to break it. A *trial* is one fault: a kill at a random instant
of a chosen part of a run, a system call that fails, a file that is cut or has a bit turned, an input that is wrong. It
*survives* when the run then ends with the same bits as one that was never disturbed, or when the damage is noticed and
named in one line. Everything else is *lost*: a different bit, a traceback, something written where nothing should be.

`make faults` runs all of it, through `nbs/runs/fault_suite.ipynb`, which shows the table; `make test` runs a little.

process   a command in a fork of this process, and what a run leaves behind
kills     the process is gone while a part of the run is at work
disk      system calls that fail
rot       files that are cut, or have a bit turned
inputs    options, genotypes, architectures and images that are wrong
strangers run folders that somebody else had in his hands
suite     all of it, shared out among processes
"""
