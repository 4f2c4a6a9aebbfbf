"""A cache as a torch dataset: entry -> crop -> batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from megafold.data.batch import Batch, draw_rows, make_batch
from megafold.data.buckets import Buckets
from megafold.data.cache import Cache
from megafold.data.cropping import crop_tokens
from megafold.data.errors import DataError
from megafold.data.features import Features
from megafold.data.sampling import Example, example_weights, find_examples


def draw_crop(
    features: Features,
    size: int,
    *,
    msa_rows: int,
    generator: np.random.Generator,
    chains: Sequence[int] | None = None,
) -> Features:
    """A random crop with randomly drawn rows of the alignment, and nothing else read.

    Args:
        features: Of the whole structure, usually memory-mapped.
        size: At most so many tokens.
        msa_rows: At most so many rows, the query included.
        generator: Every random draw comes from it: the tokens first, then the rows.
        chains: ``asym_id`` of what the crop is to be around; see ``crop_tokens``.
    """
    tokens = crop_tokens(features, size, generator=generator, chains=chains)
    rows = draw_rows(len(features.msa), msa_rows, generator)
    return features.select(tokens, rows)


class CachedDataset(Dataset):
    """One batch per structure. Use it with ``DataLoader(dataset, batch_size=None)``.

    What is random (crop, rows of the alignment, placement of conformers) is drawn from a
    generator seeded with (seed, epoch, index): the same three give the same batch, in any
    worker and any order.
    """

    def __init__(
        self,
        cache: Cache,
        crop_size: int,
        *,
        seed: int = 0,
        msa_rows: int = 1024,
        names: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            cache: Where the features are.
            crop_size: At most so many tokens.
            seed: Of everything drawn.
            msa_rows: At most so many rows. As in AlphaFold 3's training, their number is drawn
                evenly from 1 to the depth of the alignment first.
            names: Structures to use; all that the cache has if None.

        Raises:
            DataError: A name is not in the cache, or there is none.
        """
        self.cache = cache
        self.names = list(cache.names if names is None else names)
        if missing := sorted(set(self.names) - set(cache.names)):
            raise DataError(f"{cache.folder}: no structure {', '.join(missing)}")
        if not self.names:
            raise DataError(f"{cache.folder}: the cache has no structure")
        self.crop_size = crop_size
        self.seed = seed
        self.msa_rows = msa_rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw afresh; call it before the epoch's loop starts its workers."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):  # also ends a plain for loop over the dataset
            raise IndexError(f"index {index} of {len(self)} structures")
        generator = np.random.default_rng([self.seed, self.epoch, index])
        whole = self.cache.load(self.names[index])
        rows = min(int(generator.integers(1, len(whole.msa) + 1)), self.msa_rows)
        part = draw_crop(whole, self.crop_size, msa_rows=rows, generator=generator)
        return make_batch(
            part, generator=generator, msa_rows=rows, whole=whole, random_templates=True
        )


class SampledDataset(Dataset):
    """Training examples by step, for chains and interfaces drawn by their weights.

    All that is drawn (which example, the crop, rows, templates, placement of conformers) comes
    from a generator seeded with (seed, step): the same two give the same batch, in any worker
    and any order. ``BatchLoader`` goes through it.
    """

    def __init__(
        self,
        cache: Cache,
        crop_size: int,
        *,
        steps: int,
        examples: Sequence[Example] | None = None,
        seed: int = 0,
        msa_rows: int = 1024,
        buckets: Buckets | None = None,
    ) -> None:
        """
        Args:
            cache: Where the features are.
            crop_size: At most so many tokens.
            steps: Length; examples are drawn with replacement, so it is free to choose.
            examples: Some of ``find_examples(cache)``; all if None.
            seed: Of everything drawn.
            msa_rows: At most so many rows; see ``CachedDataset``.
            buckets: Shapes to pad to; None leaves batches as they are.

        Raises:
            DataError: There is no example, or one is of a structure that the cache has not.
        """
        self.cache = cache
        self.examples = tuple(find_examples(cache) if examples is None else examples)
        if not self.examples:
            raise DataError(f"{cache.folder}: no example to draw from")
        if missing := sorted({e.name for e in self.examples} - set(cache.names)):
            raise DataError(f"{cache.folder}: no structure {', '.join(missing)}")
        self.crop_size = crop_size
        self.steps = steps
        self.seed = seed
        self.msa_rows = msa_rows
        self.buckets = buckets
        self._upto = np.cumsum(example_weights(self.examples))

    @property
    def identity(self) -> dict[str, object]:
        """All that decides the examples; see ``BatchLoader.load_state_dict``."""
        keys = {e.name: self.cache.index[e.name]["key"] for e in self.examples}
        content = repr((self.examples, sorted(keys.items())))
        return {
            "examples": hashlib.sha256(content.encode()).hexdigest(),
            "crop_size": self.crop_size,
            "seed": self.seed,
            "msa_rows": self.msa_rows,
            "buckets": repr(self.buckets),
        }

    def __len__(self) -> int:
        return self.steps

    def example(self, step: int) -> Example:
        """What a step's crop is drawn for."""
        return self._draw(np.random.default_rng([self.seed, step]))

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):  # also ends a plain for loop over the dataset
            raise IndexError(f"step {step} of {len(self)}")
        generator = np.random.default_rng([self.seed, step])
        example = self._draw(generator)
        whole = self.cache.load(example.name)
        rows = min(int(generator.integers(1, len(whole.msa) + 1)), self.msa_rows)
        part = draw_crop(
            whole, self.crop_size, msa_rows=rows, generator=generator, chains=example.chains
        )
        batch = make_batch(
            part, generator=generator, msa_rows=rows, whole=whole, random_templates=True
        )
        return batch if self.buckets is None else self.buckets.pad(batch)

    def _draw(self, generator: np.random.Generator) -> Example:
        place = np.searchsorted(self._upto, generator.random(), side="right")
        return self.examples[min(int(place), len(self.examples) - 1)]
