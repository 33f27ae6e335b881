"""What an epoch measured of itself, and what to make of it: report, verdict, rendering, progress bar.

Imports `timing` and `system`; the DataLoader fills the statistics, the command line shows reports.
"""
