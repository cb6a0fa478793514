"""Calls of torch answered by others, which do without its types: only some of what torch offers is asked for."""


def replace(owner: object, **replacements: object) -> None:
    """Put replacements in the place of the attributes of these names.

    Raises:
        AttributeError: the owner has no such attribute: another version of torch would go its own way without a word.
    """
    for name, replacement in replacements.items():
        getattr(owner, name)
        setattr(owner, name, replacement)
