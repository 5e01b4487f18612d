"""TRL's trainer, with a loss over exactly the trained tokens of a step, each with its weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func
from trl import SFTTrainer

from training.answering import Answering, shares
from training.data.collator import IGNORED
from training.data.order import StepLoader, StepSampler
from training.modeling.attention import document_starts
from training.modeling.expert_parallel import clip_gradients, owned
from training.modeling.loss import weighted_nll
from training.modeling.offload import Offload
from training.modeling.sharding import is_sharded


class WeightedTrainer(SFTTrainer):
    """SFTTrainer whose loss is Σ weight · negative log-likelihood / number of trained tokens, in nats.

    Both go over all rows of an optimizer step, whatever micro-batch, accumulation and worker they fall to, so the
    gradients of 1 × 8 rows are those of 8 × 1. Batches are the `Collator`'s; weights that are missing are 1, and
    doubling every weight doubles the loss. A token that begins a document carries no label and is never predicted from
    the document before it.

    In evaluation the loss is the same mean over the whole held-out set, where transformers averages the means of
    batches, and holds no balancing loss. The log has TRL's `mean_token_accuracy`, `num_tokens` (tokens of the rows that
    went through the model, padding included, since this process began) and `aux_loss` (the balancing loss before its
    coefficient), but no entropy; workers add up their figures when a line is logged, and not before.

    Args:
        arguments: as SFTTrainer's. The model is a gpt-oss whose head is frozen, as `peft_config` makes it.
        chunk_tokens: trained tokens whose logits over the whole vocabulary are in memory at once.
        router_balance: coefficient of the load balancing loss (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6),
            computed for each micro-batch without its padding and averaged over the micro-batches of a step. At 0 no
            router logits are asked for. A micro-batch of filler rows alone counts as zero.
        global_batch_size: rows of an optimizer step over all workers, in the order of `training.data.order`; the
            arguments' `gradient_accumulation_steps` is then `StepSampler.accumulation`. None leaves the order of
            training rows to transformers. Evaluation is transformers' in any case.
        group_lengths: rows of like length, by the column `length_column_name`, become neighbours; with
            `global_batch_size` alone.
        full_batches: as StepSampler's.
        shares: as StepSampler's; with `global_batch_size` alone, and not where workers share a base, whose gathers
            need as many micro-batches on each.
        activation_offload: activations wait in host memory between forward and backward pass.
        languages: of the held-out rows, by their places in the column `languages`; evaluation then also says the loss
            of each, `eval_loss_TAG`.
        answering: held-out questions that evaluation has the model answer; its figures are then those of
            `training.answering.shares`, too.
        keywords: as SFTTrainer's.

    Raises:
        ValueError: the arguments ask for a loss of TRL's or transformers'.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *arguments: Any,
        chunk_tokens: int = 2048,
        router_balance: float = 0.0,
        global_batch_size: int | None = None,
        group_lengths: bool = False,
        full_batches: bool = False,
        shares: Sequence[int] | None = None,
        activation_offload: bool = False,
        languages: Sequence[str] = (),
        answering: Answering | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        self.chunk_tokens = chunk_tokens
        self.router_balance = router_balance
        self.global_batch_size = global_batch_size
        self.group_lengths = group_lengths
        self.full_batches = full_batches
        self.languages = tuple(languages)
        self.answering = answering
        self.shares = shares
        self.offload = Offload(self.model, self.args.device) if activation_offload else None
        self._training, self._evaluation = _Sums(), _Sums()
        self._tokens_before = 0
        self._refuse_other_losses()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This worker's part of the loss, fp32 [].

        Args:
            model: perhaps wrapped, for data parallelism or by PEFT.
            inputs: `input_ids`, `labels`, `position_ids` and perhaps `loss_weights`, each [B, T]; token t of the
                latter weighs the prediction of token t from those before it.
            return_outputs: must be False.
            num_items_in_batch: trained tokens of the step over all workers, as transformers counts them: labels from
                the second column on, for none can be predicted without a token before it. Without it the loss is
                the mean over these inputs.

        Raises:
            NotImplementedError: `return_outputs` is set.
        """
        if return_outputs:
            raise NotImplementedError("logits are never whole, so there are none for compute_metrics; leave it unset")
        labels = inputs["labels"] if model.training else self._without_repeated_rows(inputs["labels"])
        balanced = model.training and self.router_balance > 0
        fed = {name: inputs[name] for name in inputs if name not in ("labels", "loss_weights", "languages")}
        # The one wait for the device, for the number of tokens; each token is predicted at the place before its own.
        places = pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero().squeeze(1)
        offloading = self.offload() if self.offload and model.training else nullcontext()
        with offloading, _taking_head_input(self.model.get_output_embeddings()) as taken:
            outputs = model(**fed, use_cache=False, output_router_logits=balanced)
        hidden = taken[0].flatten(0, 1).index_select(0, places)
        weights = inputs.get("loss_weights")
        loss, hits = weighted_nll(
            hidden,
            self.model.get_output_embeddings().weight,
            labels.flatten()[places + 1],
            torch.ones_like(places, dtype=torch.float32) if weights is None else weights.flatten()[places + 1],
            self.chunk_tokens,
            scale=self._scale(len(places), num_items_in_batch),
        )
        sums = self._training if model.training else self._evaluation
        sums.add(hits=hits, trained=len(places), tokens=labels.numel(), written=_padding_mask(inputs).sum())
        if not model.training:
            sums.add(nll=loss.detach().double() * len(places))
            if "languages" in inputs:
                self._add_languages(hidden, labels.flatten()[places + 1], inputs, places)
        if balanced:
            balance, counted = self._balancing_loss(outputs.router_logits, inputs)
            sums.add(balance=balance.detach(), batches=counted)
            steps = 1.0 if num_items_in_batch is None else self._mean_accumulation()
            loss = loss + self.router_balance / steps * balance
        return loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As transformers' without `global_batch_size`; with it a `StepLoader` of this worker.

        Raises:
            ValueError: `gradient_accumulation_steps` does not make steps of `global_batch_size` rows.
        """
        if self.global_batch_size is None:
            stock: DataLoader[Any] = super().get_train_dataloader()
            return stock
        rows, settings = self.train_dataset, self.args
        sampler = StepSampler(
            len(rows),
            self.global_batch_size,
            settings.per_device_train_batch_size,
            settings.world_size,
            settings.process_index,
            settings.seed,
            rows[settings.length_column_name][:] if self.group_lengths else None,
            full_batches=self.full_batches,
            shares=self.shares,
        )
        if settings.gradient_accumulation_steps != sampler.accumulation:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} takes gradient_accumulation_steps = "
                f"{sampler.accumulation}, not {settings.gradient_accumulation_steps}"
            )
        return StepLoader(
            rows,
            sampler,
            self.data_collator,
            num_workers=settings.dataloader_num_workers,
            pin_memory=settings.dataloader_pin_memory and settings.device.type == "cuda",
            persistent_workers=settings.dataloader_persistent_workers,
            prefetch_factor=settings.dataloader_prefetch_factor,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with the figures since the last line of training, over all workers."""
        if self.model.training and (figures := self._training.take(self.accelerator)):
            self._tokens_before += int(figures["tokens"])
            logs["mean_token_accuracy"] = figures["hits"] / max(1, figures["trained"])
            logs["num_tokens"] = self._tokens_before
            logs |= self.figures(int(figures["written"]))
            if self.router_balance > 0:
                logs["aux_loss"] = figures["balance"] / max(1, figures["batches"])
        super().log(logs, start_time)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What passes through the model within leaves no trace in the figures of training."""
        before, self._training = self._training, _Sums()
        try:
            yield
        finally:
            self._training = before

    def figures(self, tokens: int) -> dict[str, float]:
        """What else belongs in a line of training, of whose steps `tokens` went through the model, padding left out."""
        return {}

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **keywords: Any) -> Any:
        """As transformers', with each trained token counted once and alike."""
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **keywords)
        if self.answering is not None:
            self._evaluation.add(**self.answering.sums(self.model))
        if figures := self._evaluation.take(self.accelerator):
            trained = max(1, figures["trained"])
            output.metrics[f"{metric_key_prefix}_loss"] = figures["nll"] / trained
            output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = figures["hits"] / trained
            for tag in self.languages:
                of_language = figures[f"nll {tag}"] / max(1, figures[f"trained {tag}"])
                output.metrics[f"{metric_key_prefix}_loss_{tag}"] = of_language
            output.metrics.update({f"{metric_key_prefix}_{name}": share for name, share in shares(figures).items()})
        return output

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """As transformers', but for a sharded base, which accelerate would not wrap on GPUs: it takes DTensors for a
        sign that FSDP2 reduces the gradients, and here the adapters are whole and DDP reduces them."""
        alone = self.args.world_size == 1 or isinstance(model, DistributedDataParallel)
        if not training or alone or not is_sharded(model):
            return super()._wrap_model(model, training, dataloader)
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        devices = [self.args.device] if self.args.device.type == "cuda" else None
        return DistributedDataParallel(prepared, device_ids=devices)

    def _clip_grad_norm(self, model: Any) -> Any:
        """As transformers', over the experts of all workers where each has others."""
        if not self._shares_experts(model):
            return super()._clip_grad_norm(model)
        return clip_gradients(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As transformers', which asks for one where nothing was clipped."""
        if grad_norm is None and self._shares_experts(model):
            return clip_gradients(model.parameters(), float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _shares_experts(self, model: Any) -> bool:
        return any(map(owned, model.parameters()))

    def _refuse_other_losses(self) -> None:
        asked = {
            "compute_loss_func": (self.compute_loss_func, None),
            "router_aux_loss_coef": (self.args.router_aux_loss_coef, 0.0),
            "label_smoothing_factor": (self.args.label_smoothing_factor, 0.0),
            "loss_type": (self.args.loss_type, "nll"),
            "average_tokens_across_devices": (self.args.average_tokens_across_devices, True),
        }
        for name, (value, only) in asked.items():
            if value != only:
                raise ValueError(f"WeightedTrainer computes the loss itself; set {name} to {only!r}, not {value!r}")

    def _scale(self, trained: int, items: torch.Tensor | int | None) -> float | torch.Tensor:
        """One over the mean's number of tokens; times the workers, over whose gradients DDP takes the mean."""
        if items is None:
            return 1 / max(1, trained)
        workers: int = self.accelerator.num_processes // self.get_tp_size()
        return workers / torch.as_tensor(items).clamp(min=1)

    def _mean_accumulation(self) -> float:
        """Micro-batches of a worker in a step, the mean over the workers, over whose gradients DDP takes the mean."""
        if self.shares is None:
            return float(self.current_gradient_accumulation_steps)
        return sum(self.shares) / len(self.shares)

    def _without_repeated_rows(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels [B, T] without those of the rows that accelerate repeats, so that each worker has as many."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        kept = max(0, state.remainder - self.accelerator.process_index * len(labels))
        return torch.cat((labels[:kept], torch.full_like(labels[kept:], IGNORED)))

    def _add_languages(
        self, hidden: torch.Tensor, labels: torch.Tensor, inputs: dict[str, Any], places: torch.Tensor
    ) -> None:
        """Each language's part of an evaluation's sums; all languages on every worker, which add up the same names."""
        spoken = inputs["languages"].flatten()[places + 1]
        weights = inputs.get("loss_weights")
        for place, tag in enumerate(self.languages):
            own = (spoken == place).nonzero().squeeze(1)
            nll, _ = weighted_nll(
                hidden.index_select(0, own),
                self.model.get_output_embeddings().weight,
                labels[own],
                torch.ones_like(own, dtype=torch.float32) if weights is None else weights.flatten()[places + 1][own],
                self.chunk_tokens,
            )
            sums: dict[str, torch.Tensor | int] = {f"nll {tag}": nll.detach().double(), f"trained {tag}": len(own)}
            self._evaluation.add(**sums)

    def _balancing_loss(
        self, router_logits: tuple[torch.Tensor, ...], inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Balancing loss, fp32 [], and int64 []: 1, or 0 where all is padding and the loss a differentiable zero."""
        shape, mask = self.model.config, _padding_mask(inputs)
        counted = mask.amax()
        balance: torch.Tensor = load_balancing_loss_func(
            router_logits, shape.num_local_experts, shape.num_experts_per_tok, mask.where(counted > 0, 1)
        )
        return balance * counted, counted


@contextmanager
def _taking_head_input(head: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within, `head` hands over the hidden states [B, T, H] it is called with, and projects none of them.

    The model is called as ever, through every wrapper, which data parallelism needs, and the hook is gone afterwards:
    generation and the names of parameters are as they were.
    """
    taken: list[torch.Tensor] = []

    def take(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        taken.append(arguments[0])
        return (arguments[0][:, :0],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


def _padding_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """int64 [B, T]: 0 in the padding, which is a last segment of one repeated token without labels; else 1."""
    tokens, starts = inputs["input_ids"], document_starts(inputs["position_ids"]).long()
    last = starts.flip(1).cumsum(1).flip(1) == starts
    written = (tokens != tokens[:, -1:]) | (inputs["labels"] != IGNORED)
    return (~last | (last & written).any(dim=1, keepdim=True)).long()


class _Sums:
    """Figures of this worker by name; those that are tensors stay on the device until they are taken."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def add(self, **values: torch.Tensor | int) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value

    def take(self, accelerator: Any) -> dict[str, float]:
        """Totals over all workers; then the sums begin again. Nothing, and no exchange, if nothing was added."""
        values, self.values = self.values, {}
        if not values:
            return {}
        own = [torch.as_tensor(value, dtype=torch.float64, device=accelerator.device) for value in values.values()]
        return dict(zip(values, accelerator.reduce(torch.stack(own), "sum").tolist(), strict=True))
