"""Every method in PyTorch, by the name of its declaration in `m3ad.methods`."""

from m3ad_export.method import Implementation
from m3ad_export.methods import ast, btf, cfm, cmdr_iad, crd, m3dm, m3dm_uff, mentor3ad, shape_guided

IMPLEMENTATIONS: dict[str, Implementation] = {
    "mentor3ad": mentor3ad.IMPLEMENTATION,
    "cfm": cfm.IMPLEMENTATION,
    **cmdr_iad.IMPLEMENTATIONS,
    **crd.IMPLEMENTATIONS,
    "m3dm": m3dm.IMPLEMENTATION,
    "m3dm_uff": m3dm_uff.IMPLEMENTATION,
    "btf": btf.IMPLEMENTATION,
    "ast": ast.IMPLEMENTATION,
    "shape_guided": shape_guided.IMPLEMENTATION,
}
