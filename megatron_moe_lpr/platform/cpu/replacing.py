"""`setattr` that fails if the attribute does not exist, and without the types of torch's own functions."""


def replace(owner: object, **replacements: object) -> None:
    """Replace attributes of `owner`, a module or class, by keyword.

    Raises:
        AttributeError: `owner` has no such attribute: another version of torch would silently keep its own function.
    """
    for name, replacement in replacements.items():
        getattr(owner, name)
        setattr(owner, name, replacement)
