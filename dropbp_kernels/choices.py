"""The words that options take. Nothing is imported here: the command line checks them before torch is."""

GRANULARITIES = ("branch", "sample", "token")
DROPPED_RUNS = ("inference", "detach")
CONTEXT_GRADIENTS = ("none", "one_hop", "full")
TURNS = ("auto", "apart", "together")
ALLOCATIONS = ("published", "optimal", "variance")
MISSING_GRAD = ("skip", "zero")


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Errors: ValueError unless `value`, given for the option `name`, is one of the words that are known."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
