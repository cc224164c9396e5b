"""A training loop of one's own, with any model: NPO on forget data, a token-weighted loss on retain data."""

import torch
import torch.nn.functional as F

import trace_kernels as tk

VOCABULARY, WIDTH, BETA = 500, 32, 0.1


class Decoder(torch.nn.Module):
    """Stands for whatever returns hidden states; its head is a Linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.mixer = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mixer(self.embedding(ids))[0]


def documents(seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(seed))


def document_log_probs(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return tk.linear_log_prob(model(ids)[:, :-1], model.head.weight, ids[:, 1:]).sum(-1)


def main(steps: int = 60) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = Decoder()
    forget, retain = documents(1), documents(2)
    weights = torch.rand(retain[:, 1:].shape, generator=torch.Generator().manual_seed(3)) + 0.5
    with torch.no_grad():
        reference = document_log_probs(model, forget)  # once: there is no second model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    log: dict[str, list[float]] = {"forget": [], "retain": []}
    for _ in range(steps):
        margin = document_log_probs(model, forget) - reference
        forget_loss = -2 / BETA * F.logsigmoid(-BETA * margin).mean()
        retain_loss = tk.linear_cross_entropy(model(retain)[:, :-1], model.head.weight, retain[:, 1:], weights)
        (forget_loss + retain_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        log["forget"].append(forget_loss.item())
        log["retain"].append(retain_loss.item())
    return log


if __name__ == "__main__":
    log = main()
    print({name: (round(values[0], 3), round(values[-1], 3)) for name, values in log.items()})
