"""What the package does with damaged input, with killed processes and with full disks."""
