"""The m3ad ops on NumPy arrays: inputs are checked here, once; the C++ or the NumPy form does the work."""

from m3ad_plugins.farthest_point_sample import farthest_point_sample as farthest_point_sample
from m3ad_plugins.fpfh import fpfh as fpfh
from m3ad_plugins.knn_group import knn_group as knn_group
from m3ad_plugins.knn_group import point_group as point_group
from m3ad_plugins.nearest_row import nearest_row as nearest_row
from m3ad_plugins.one_class_svm import KERNELS as KERNELS
from m3ad_plugins.one_class_svm import one_class_svm as one_class_svm
from m3ad_plugins.sparse_rows import InterpolatedRows as InterpolatedRows
from m3ad_plugins.sparse_rows import SparseRows as SparseRows
from m3ad_plugins.sparse_rows import cosine_scores as cosine_scores
from m3ad_plugins.token_interpolate import interpolation_operator as interpolation_operator
from m3ad_plugins.token_interpolate import token_interpolate as token_interpolate
