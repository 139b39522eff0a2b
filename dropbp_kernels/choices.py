"""The words that options take. Nothing is imported here: the command line checks them before torch is."""

GRANULARITIES = ("branch", "sample", "token")
DROPPED_RUNS = ("inference", "detach")
CONTEXT_GRADIENTS = ("none", "one_hop", "full")
ALLOCATIONS = ("published", "optimal", "variance")
MISSING_GRAD = ("skip", "zero")
