"""What was meant by a name that is none: the end of an error's line."""

from collections.abc import Iterable


def is_it(name: object, options: Iterable[str]) -> str:
    """`; is it 'ddim'?` for ddmi, or nothing where no option is spelled like it."""
    import difflib  # here, because only errors need it

    by_lower = {option.lower(): option for option in options}
    asked = str(name).lower()[:60]
    near = difflib.get_close_matches(asked, by_lower, n=3)
    near.sort(key=lambda option: sorted(option) != sorted(asked))  # two letters that changed places come first
    return f"; is it {by_lower[near[0]]!r}?" if near else ""


def there_are(name: object, options: Iterable[str]) -> str:
    """`; is it 'ddim'? there are ddpm, ddim, ...`, or without the question."""
    options = list(options)
    near = is_it(name, options)
    return f"{near or ';'} there are {', '.join(options) or 'none'}"
