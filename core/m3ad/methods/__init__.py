"""Every detector there is, by name; each is declared in a file of its own and knows no torch."""

from m3ad.contract import Dims
from m3ad.errors import M3adError
from m3ad.method import Contract, Method
from m3ad.methods import ast, btf, cfm, cmdr_iad, crd, m3dm, mentor3ad, shape_guided
from m3ad.scored import Lattice

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        mentor3ad.METHOD,
        cfm.METHOD,
        *cmdr_iad.METHODS,
        *crd.METHODS,
        *m3dm.METHODS,
        btf.METHOD,
        ast.METHOD,
        shape_guided.METHOD,
    )
}
DEFAULT_METHOD = mentor3ad.METHOD.name


def method_named(name: str) -> Method:
    """A method by its name.

    Raises:
        M3adError: there is none.
    """
    if name not in METHODS:
        raise M3adError(f"unknown method {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


def contract_of(name: str, dims: Dims, lattice: Lattice = "all") -> Contract:
    """The contract of a method's detector with these sizes, scored on this lattice.

    Raises:
        M3adError: there is no such method, or it scores every pixel.
    """
    return Contract(method_named(name), dims, lattice)
