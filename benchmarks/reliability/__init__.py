"""Trials of the package with damaged input, killed processes and full disks."""
