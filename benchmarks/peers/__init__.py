"""One module per loader, each with the same function: `make(dataset, **arguments)`, a loader over that dataset."""
