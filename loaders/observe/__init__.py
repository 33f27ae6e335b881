"""Where the time goes: the report of a loader, its verdict, traces, progress."""
