"""Reading rules, one per op, by family. To add an op, add a function here and a test in ``tests/passes/test_rules.py``.

* `index`: views, permutations, slices, gathers, padding (moves)
* `pointwise`: arithmetic, comparisons, logic, creation
* `reduction`: any, sum, amax, mean, cumsum, diff
* `membership`: scatter, index_put, one_hot, top-k
* `contraction`: matmul, einsum, scaled_dot_product_attention, softmax
"""

from .. import reader  # noqa: F401  (which imports the rule modules, in order, once its tables exist)
