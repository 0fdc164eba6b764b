"""Laplace on LoRA weights alone: a frozen GPT-2, a fine-tuned low-rank part, MAP against two posteriors over that part.

    python examples/lora.py

trains the small GPT-2 of ``huggingface.py`` on other sentences as a stand-in for pretraining, fine-tunes its attention with
PEFT, and prints accuracy, NLL and ECE. PEFT switches off the gradients of all other weights, so ``subset_of_weights="all"``
is a posterior over the LoRA weights alone.
"""

from __future__ import annotations

from huggingface import Classifier, evaluate, network, posterior, sentences, train
from torch import nn

try:
    from peft import LoraConfig, get_peft_model
except ImportError as error:
    raise SystemExit(f'This example needs peft: pip install -e ".[hf]" ({error})') from error


def with_lora(model: Classifier) -> nn.Module:
    """The model with trainable low-rank updates of its attention weights, and all else frozen."""
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["c_attn"], lora_dropout=0.1, bias="none", fan_in_fan_out=True
    )
    return get_peft_model(model, config)


def main(epochs: int = 120) -> dict[str, dict[str, float]]:
    """Fine-tune, fit, and compare."""
    pretrained = train(network(), sentences(512, seed=4, wrong=0.3), epochs=15)
    model = train(with_lora(pretrained), sentences(192, seed=1), epochs)
    chosen = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{chosen} of {sum(p.numel() for p in model.parameters())} weights have a distribution")
    predictors: dict = {"MAP": model}
    for structure in ("kron", "diag"):
        predictors[f"LoRA × {structure}"] = posterior(model, "all", structure)
    return evaluate(predictors)


if __name__ == "__main__":
    main()
