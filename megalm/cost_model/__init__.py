"""The cost of a layout before a run starts, as integers: memory by part, sizes of shards, balance of stages."""
