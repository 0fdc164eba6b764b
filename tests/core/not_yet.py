"""What the library does not get right yet, in the words of :mod:`tests.core.random_models`: mend it and take its line out.

A key is a feature or choice, or several that have to meet, joined by ``×``. Random models that hold all of a key are left
out of the suite; ``python benchmarks/random_models.py --not-yet`` runs them and says which lines can go. A key of ``CHECKS``
leaves out one check of all models. Rare ones have the first seed that shows them, since a few thousand models may not.
"""

from __future__ import annotations

_FALLBACK = "the fallback to per-example autograd ends in torch's message"
_RANDOM = "a model that is random in evaluation mode is fitted, or refused in torch's words"
_COUPLED = "a model whose examples depend on one another is fitted, or refused in torch's words"
_OUTSIDE = "what is no tensor ends in Python's message"
_PROBE = "one probed example without gradient counts as a proof that the layer is a plain one"
_NO_GRAD = "a call without a gradient ends in torch's message"
_LAST_LAYER = "a last layer that is more than its weight and bias is taken as plain, or ends in torch's message"

NOT_YET: dict[str, str] = {
    # outputs and inputs
    "dict_output": _OUTSIDE,
    "tuple_output": _OUTSIDE,
    "tuple_input": _OUTSIDE,
    "one_value_per_example": _OUTSIDE,
    "classes_first": "one of two readings is taken without a word",
    # the fallback
    "gru_cell": _FALLBACK,
    "lstm_cell": _FALLBACK,
    "rnn_cell": _FALLBACK,
    "gru": _FALLBACK,
    "gru_batch_second": _FALLBACK,
    "lstm": _FALLBACK,
    "rnn": _FALLBACK,
    "prelu": _FALLBACK,
    "prelu_per_channel": _FALLBACK,
    "channel_prelu": _FALLBACK,
    "rrelu": _FALLBACK,
    "mask_assignment": _FALLBACK,
    "mask_assignment_after_norm": _FALLBACK,
    "nonzero_indices": _FALLBACK,
    "selected_positions": _FALLBACK,
    "padded_tokens": _FALLBACK,
    "custom_function": _FALLBACK,
    "checkpointed": _FALLBACK,
    "autograd_in_forward": _FALLBACK,
    "complex_parameter": _FALLBACK,
    "embedding_max_norm": _FALLBACK,
    "embedding_sparse": _FALLBACK,
    "bfloat16 × norm": _FALLBACK,
    "bfloat16 × bilinear": _FALLBACK,
    # calls without a gradient
    # models that have no definition
    "functional_dropout": _RANDOM,
    "noise_in_forward": _RANDOM,
    "stochastic_depth": _RANDOM,
    "random_weight": _RANDOM,
    "batch_statistics": _COUPLED,
    "centred_over_batch": _COUPLED,
    "attention_over_batch": _COUPLED,
    # what decides coverage
    "channel_norm": "an error inside of the coverage check ends the fit",
    "channels_last_memory": "an error inside of the coverage check ends the fit",
    "folded_positions_first": _PROBE,
    "positions_first": "a batch of another size ends in torch's message",  # first at seed 6909
    "used_outside": _PROBE,  # first at seed 15211
    "forward_hook_that_scales": _PROBE,
    "scaled_subclass": _PROBE,
    "standardised_linear": _PROBE,
    "standardised_conv": _PROBE,
    "bfloat16 × full": "products of two precisions",
    # the last layer
    "warns of diagonal blocks": "a linear layer or convolution gets a diagonal block without a word",
}
CHECKS = frozenset({"warns of diagonal blocks"})


def missing(names: frozenset[str]) -> list[str]:
    """The keys of the table that a model of these names holds."""
    return [key for key in NOT_YET if key not in CHECKS and names.issuperset(key.split(" × "))]
