"""Which trials run where, and how they went: grid, store, executors, tracking, comparison. No tensor code."""
