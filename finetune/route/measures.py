"""The measures of a layer's routing, from counts.

Shapes: E experts, L labels, S samples.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..router_load import Routed

NUM_SHUFFLES = 20  # of the labels, for what their measure is by chance


@dataclass
class Tally:
    """What a layer did with the tokens of one modality of one dataset.

    Attributes:
        num_experts: E.
        tokens: how many.
        unserved: tokens that no expert took.
        assigned_E: assignments.
        open_E: which experts were open to some of these tokens.
        together_EE: tokens that were sent to both of two experts; on the diagonal, to the one.
        confidence: the sum of the tokens' largest shares, of tokens that had a choice, and their number.
        by_sample: for each sample its assignments, (E,).
        by_class: for each class of words its assignments, (E,).
    """

    num_experts: int
    tokens: int = 0
    unserved: int = 0
    assigned_E: Tensor = field(init=False)
    open_E: Tensor = field(init=False)
    together_EE: Tensor = field(init=False)
    confidence: tuple[float, int] = (0.0, 0)
    by_sample: dict[int, Tensor] = field(default_factory=dict)
    by_class: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.assigned_E = torch.zeros(self.num_experts, dtype=torch.long)
        self.open_E = torch.zeros(self.num_experts, dtype=torch.bool)
        self.together_EE = torch.zeros(self.num_experts, self.num_experts, dtype=torch.long)

    def add(self, routed: Routed, is_counted_T: Tensor, sample_T: Tensor, class_T: list[str] | None = None) -> None:
        """Counts some tokens of one pass.

        Args:
            routed: the pass.
            is_counted_T: which of its tokens, bool.
            sample_T: each token's sample.
            class_T: each token's class of words, where it has one.
        """
        index_T = is_counted_T.nonzero().flatten()
        chosen_TE = routed.chosen_TE[index_T]
        self.tokens += len(index_T)
        self.unserved += int((~chosen_TE.any(-1)).sum())
        self.assigned_E += chosen_TE.sum(0)
        self.open_E |= routed.open_TE[index_T].any(0)
        self.together_EE += (chosen_TE.double().T @ chosen_TE.double()).long()
        sure_T = routed.confidence_T[index_T][routed.has_choice_T[index_T]]
        self.confidence = (self.confidence[0] + sure_T.double().sum().item(), self.confidence[1] + len(sure_T))
        for sample in sample_T[index_T].unique().tolist():
            found_E = chosen_TE[sample_T[index_T] == sample].sum(0)
            self.by_sample[sample] = self.by_sample.get(sample, torch.zeros_like(found_E)) + found_E
        if class_T is not None:
            for place, index in enumerate(index_T.tolist()):
                kind = class_T[index]
                known_E = self.by_class.get(kind, torch.zeros_like(self.assigned_E))
                self.by_class[kind] = known_E + chosen_TE[place]

    @property
    def mean_confidence(self) -> float | None:
        """The mean top probability; None where no token had a choice."""
        total, number = self.confidence
        return total / number if number else None

    @property
    def dead(self) -> list[int]:
        """Experts that are open to these tokens and got none."""
        return (self.open_E & (self.assigned_E == 0)).nonzero().flatten().tolist()


def merged(tallies: list[Tally]) -> Tally:
    """The sum of some tallies of one layer, but for their samples."""
    total = Tally(tallies[0].num_experts)
    for one in tallies:
        total.tokens, total.unserved = total.tokens + one.tokens, total.unserved + one.unserved
        total.assigned_E += one.assigned_E
        total.open_E |= one.open_E
        total.together_EE += one.together_EE
        total.confidence = (total.confidence[0] + one.confidence[0], total.confidence[1] + one.confidence[1])
        for kind, count_E in one.by_class.items():
            total.by_class[kind] = total.by_class.get(kind, torch.zeros_like(count_E)) + count_E
    return total


def entropy(count: Tensor) -> Tensor:
    """The entropy of the shares of some counts, in nats."""
    return torch.special.entr(count.double() / count.sum().clamp(min=1)).sum()


def load_entropy(tally: Tally) -> float | None:
    """The entropy of the experts' load, divided by log(open experts): 1 when even; None with one open expert."""
    number = int(tally.open_E.sum())
    if number < 2 or not tally.assigned_E.sum():
        return None
    return (entropy(tally.assigned_E) / torch.log(torch.tensor(float(number)))).item()


def shared_information(count_LE: Tensor) -> float:
    """The normalised mutual information of label and expert: I(L; E) / sqrt(H(L) H(E)), 0 to 1 (Strehl and Ghosh,
    2002, JMLR 3, eq. 2); 0 where one of them is always the same.
    """
    labels, experts = entropy(count_LE.sum(1)), entropy(count_LE.sum(0))
    scale = (labels * experts).sqrt()
    if scale < 1e-12:
        return 0.0
    return ((labels + experts - entropy(count_LE)) / scale).clamp(0, 1).item()


def by_chance(count_SE: Tensor, label_S: Tensor, num_labels: int) -> float:
    """What `shared_information` is when the labels are shuffled over the samples: the mean of `NUM_SHUFFLES` times."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(NUM_SHUFFLES):
        shuffled_S = label_S[torch.randperm(len(label_S), generator=generator)]
        total += shared_information(count_by(count_SE, shuffled_S, num_labels))
    return total / NUM_SHUFFLES


def count_by(count_SE: Tensor, label_S: Tensor, num_labels: int) -> Tensor:
    """The samples' counts added up by their labels, (L, E)."""
    return torch.zeros(num_labels, count_SE.shape[1], dtype=count_SE.dtype).index_add_(0, label_S, count_SE)


def table_by_chance(count_LE: Tensor) -> float:
    """What `shared_information` is when the experts are shuffled over the assignments, as `by_chance`."""
    labels, experts = (
        torch.repeat_interleave(torch.arange(len(margin)), margin) for margin in (count_LE.sum(1), count_LE.sum(0))
    )
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(NUM_SHUFFLES):
        cells = labels * count_LE.shape[1] + experts[torch.randperm(len(experts), generator=generator)]
        total += shared_information(torch.bincount(cells, minlength=count_LE.numel()).view_as(count_LE))
    return total / NUM_SHUFFLES
