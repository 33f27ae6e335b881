"""What was measured in an epoch, and what follows from it: report, verdict, rendering, progress bar.

Imports `workers` and the layers below it; the DataLoader fills the statistics, the command line shows reports.
"""
