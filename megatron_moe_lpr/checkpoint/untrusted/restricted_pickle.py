"""Read pickles that are not trusted: nothing they name is imported, called or changed.

A restriction of names alone is not one: BUILD on an allowed class sets attributes of it for the whole process, and a
call of an allowed function may return an object that others share. So what a pickle would call or make is only
described here, by `Name` and `Call`; the readers of each format turn the few descriptions that they know into values.
"""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

KEY_LIMIT = 1 << 31
"""Of numbers as keys: larger ones can be chosen so that all of them fall on one place of a hash table."""
MAX_DEPTH = 50
"""Of values in each other."""
SHARED_VALUES = 1 << 20
"""More values than bytes that a file may have by referring to some of them again."""
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 TUPLE EMPTY_TUPLE "
    "TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST EMPTY_DICT GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE"
)
"""Those of `pickle._Unpickler` that make plain values only. Left out: all that reach for something outside of the
pickle (persistent ids, extensions, buffers), sets, which hash whatever they are given, and what allocates memory by a
number alone (BYTEARRAY8)."""


class Readable(Protocol):
    """What a pickle is read from."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class Name(NamedTuple):
    """A class, function or object by its name, which is not looked up."""

    module: str
    name: str


class Call:
    """An object that the pickle would make: what it would call, with which arguments, and the state set afterwards.

    `is_new` says that it would make an instance of a class, not call it: what a call returns may be shared by others.
    """

    __slots__ = ("arguments", "function", "is_new", "state")

    def __init__(self, function: Name, arguments: tuple, is_new: bool) -> None:
        self.function, self.arguments, self.is_new = function, arguments, is_new
        self.state: Any = None


class PersistentId(NamedTuple):
    """What the pickle refers to outside of itself; in files of torch a tensor's storage."""

    value: Any


class _Dispatch(dict):
    def __missing__(self, opcode: int) -> Any:
        raise pickle.UnpicklingError(f"it holds the pickle opcode {bytes([opcode])!r}, which no checkpoint needs")


class RestrictedUnpickler(pickle._Unpickler):
    """Python's own form of the unpickler: the one in C calls and builds by itself.

    Args:
        stream: the pickle; after `load` it stands behind it.
        is_allowed: whether a module's name may stand in the pickle.
        persistent: whether it may refer to storages outside of itself.
    """

    # Of the class above; typeshed does not know them.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    readline: Callable[[], bytes]

    dispatch = _Dispatch(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES.split()}
    )

    def __init__(self, stream: Readable, is_allowed: Callable[[str, str], bool], persistent: bool = False) -> None:
        super().__init__(stream)
        self.is_allowed, self.persistent = is_allowed, persistent

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or not self.is_allowed(module, name):
            raise pickle.UnpicklingError(f"it names {_short(module)}.{_short(name)}, which no checkpoint needs")
        self.append(Name(module, name))

    def load_global(self) -> None:
        module, name = (self.readline()[:-1].decode("utf-8") for _ in range(2))
        self._name(module, name)

    def load_stack_global(self) -> None:
        name = self.stack.pop()
        self._name(self.stack.pop(), name)

    def load_reduce(self) -> None:
        self._call(is_new=False)

    def load_newobj(self) -> None:
        self._call(is_new=True)

    def _call(self, is_new: bool) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls something that is no class or function by name")
        if function == ("collections", "OrderedDict") and not arguments:
            self.append({})
        else:
            self.append(Call(function, arguments, is_new))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is not Call or not target.is_new or target.arguments or target.state is not None:
            raise pickle.UnpicklingError(f"it sets the state of {_described(target)}")
        target.state = state

    def load_append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._list().extend(values)

    def _list(self) -> list:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError(f"it appends to {_described(self.stack[-1])}")
        return self.stack[-1]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_items(self, items: list) -> None:
        table = self.stack[-1]
        if type(table) is not dict or len(items) % 2:
            raise pickle.UnpicklingError(f"it sets items of {_described(table)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (type(key) in (str, Call) or (type(key) is int and -KEY_LIMIT < key < KEY_LIMIT)):
                raise pickle.UnpicklingError(f"{_described(key)} is a key")
            table[key] = value

    def load_binpersid(self) -> None:
        if not self.persistent:
            raise pickle.UnpicklingError("it refers to something outside of itself")
        self.append(PersistentId(self.stack.pop()))

    for _opcode, _method in (
        (pickle.GLOBAL, load_global),
        (pickle.STACK_GLOBAL, load_stack_global),
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.BUILD, load_build),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.BINPERSID, load_binpersid),
    ):
        dispatch[_opcode[0]] = _method
    del _opcode, _method


def read_pickle(stream: Readable, is_allowed: Callable[[str, str], bool], persistent: bool = False) -> Any:
    """One pickle from a stream, as plain values, `Name`, `Call` and `PersistentId`.

    Raises:
        pickle.UnpicklingError: it does what no checkpoint needs.
        Exception: it is damaged; almost any kind.
    """
    return RestrictedUnpickler(stream, is_allowed, persistent).load()


def check_extent(value: Any, pickled_bytes: int) -> None:
    """Check that what `read_pickle` returned is small also for a reader who follows every reference.

    A list that holds one list ten times, which holds another ten times, and so on, has more values than any reader can
    visit, out of a few bytes; one that holds itself has no end.

    Args:
        pickled_bytes: length of the pickle. One that refers to nothing twice has fewer values than bytes.

    Raises:
        pickle.UnpicklingError: it has `SHARED_VALUES` more, or is nested deeper than `MAX_DEPTH`.
    """
    if _extent(value, {})[0] > pickled_bytes + SHARED_VALUES:
        raise pickle.UnpicklingError("its values refer to each other too often")


def _extent(value: Any, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """Number of values and of levels, found once for each object however often it is reached."""
    if type(value) not in (dict, list, tuple, Call, PersistentId):
        return 1, 0
    if id(value) not in known:
        below = [_extent(part, known, depth + 1) for part in _parts(value)] if depth < MAX_DEPTH else [(0, MAX_DEPTH)]
        levels = 1 + max((one for _, one in below), default=0)
        if levels > MAX_DEPTH:
            raise pickle.UnpicklingError("it is nested too deeply")
        known[id(value)] = 1 + sum(count for count, _ in below), levels
    return known[id(value)]


def _parts(value: Any) -> list[Any]:
    if type(value) is dict:
        return [*value.keys(), *value.values()]
    if type(value) is Call:
        return [value.function, value.arguments, value.state]
    return [value.value] if type(value) is PersistentId else list(value)


def whole_number(value: Any, limit: int = 1 << 63) -> int:
    """The value, if it is an int from 0 to below `limit`.

    Raises:
        pickle.UnpicklingError: it is not.
    """
    if type(value) is not int or not 0 <= value < limit:
        raise pickle.UnpicklingError(f"{_described(value)} where a size or a place is expected")
    return value


def _described(value: Any) -> str:
    """Never its repr: what holds itself many times over has an endless one."""
    if type(value) is Name:
        return f"{_short(value.module)}.{_short(value.name)}"
    if type(value) is Call:
        return f"an object of {_described(value.function)}"
    return f"a {type(value).__name__}"


def _short(text: Any) -> str:
    return f"{text!r:.60}".strip("'") if type(text) is str else f"a {type(text).__name__}"
