"""TRACE as a loop of one's own: profile, calibrate, three lines of loss. The model is tiny and random."""

import datasets
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import trace_kernels as tk
from trace_unlearn import attach_weights, calibrate, collate, profile_routing, select_experts, shifted_targets


def documents(low: int, high: int, count: int) -> datasets.Dataset:
    """Random ones; `trace_unlearn.load_tokens("forget.jsonl", tokenizer)` reads real ones."""
    ids = torch.randint(low, high, (count, 24), generator=torch.Generator().manual_seed(low)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def main(steps: int = 20, alpha: float = 4.0) -> list[dict[str, float]]:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=300, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2,
                            num_experts=8, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2,
                            head_dim=32)  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    forget, retain = documents(0, 100, 8), documents(50, 300, 32)

    stats = profile_routing(model, forget, retain, pad_token_id=0, progress=False)
    retain = attach_weights(retain, calibrate(stats, select_experts(stats, experts_per_layer=2)))

    def loss_of(rows: list[dict[str, list[float]]]) -> torch.Tensor:
        """The token-weighted cross-entropy of a batch, without logits; column token_weight holds the weights."""
        batch = collate(rows, pad_token_id=0)
        hidden = model.model(batch.pop("input_ids"), batch["attention_mask"]).last_hidden_state
        return tk.linear_cross_entropy(hidden, model.lm_head.weight, *shifted_targets(**batch))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    log = []
    for step in range(steps):
        forget_loss = loss_of([forget[i % 8] for i in range(2 * step, 2 * step + 2)])
        retain_loss = loss_of([retain[i % 32] for i in range(4 * step, 4 * step + 4)])
        (alpha * retain_loss - forget_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"forget": forget_loss.item(), "retain": retain_loss.item()})
    return log


if __name__ == "__main__":
    log = main()
    print("first", log[0], "last", log[-1], sep="\n")
