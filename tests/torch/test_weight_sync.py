"""Senders and receivers of weights, and the adapters to transformers and TRL."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfpformat import BaseMismatchError, DeltaWriter, MismatchError, OptionError, write_delta_index
from sfpformat.torch import save_model
from sfpformat.torch.tensors import array_of
from sfpformat.torch.weight_sync import DeltaReceiver, DeltaSender, DeltaWeightTransfer, WeightSyncCallback
from sfpformat.torch.weight_sync.trl_transfer import _TRL, require_interface


def net() -> nn.Sequential:
    """A model in BF16."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)).to(torch.bfloat16)


def step(model: nn.Module) -> None:
    """Changes a few weights."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.view(-1)[::5] += 1e-2


def same(a: Any, b: nn.Module) -> bool:
    """Whether weights by name are those of a model."""
    return a.keys() == b.state_dict().keys() and all(torch.equal(a[n], w) for n, w in b.state_dict().items())


@pytest.mark.parametrize("with_base", [True, False])
def test_a_receiver_follows_a_sender(tmp_path: Path, with_base: bool) -> None:
    model = net()
    sender = DeltaSender(tmp_path, base=model if with_base else None)
    receiver = DeltaReceiver(model if with_base else None)
    for number in range(1, 4):
        step(model)
        sent = sender.send(model.named_parameters())
        assert (sent.number, sent.whole) == (number, number == 1 and not with_base)
        assert sent.nbytes == sent.path.stat().st_size
        if number != 2:  # the receiver may be behind
            changed = receiver.catch_up(tmp_path)
            assert set(changed) == set(model.state_dict())
            assert same(receiver.tensors, model)
    assert receiver.number == 3
    assert receiver.catch_up(tmp_path) == []
    assert sender.send({}).nbytes > 0  # nothing was sent: all weights stay
    assert receiver.catch_up(tmp_path) == []
    assert same(receiver.tensors, model)
    sender.reset()
    assert sender.send(model.named_parameters()).whole
    late = DeltaReceiver(number=4)
    late.catch_up(tmp_path)
    assert same(late.tensors, model)


def test_a_receiver_follows_deltas_in_shards(tmp_path: Path) -> None:
    model = net()
    receiver, before = DeltaReceiver(model), {n: w.clone() for n, w in model.state_dict().items()}
    step(model)
    paths = [tmp_path / f"weights-00000001-0000{n}-of-00002.sfp" for n in (1, 2)]
    for number, path in enumerate(paths):
        with DeltaWriter(path, shard=number + 1) as writer:
            for name, weight in list(model.state_dict().items())[number::2]:
                writer.add(name, *(array_of(tensor, name) for tensor in (before[name], weight)))
    write_delta_index(tmp_path / "weights-00000001.sfp.index.json", paths)
    assert set(receiver.read(tmp_path / "weights-00000001.sfp.index.json")) == set(before)
    assert set(receiver.catch_up(tmp_path)) == set(before)
    assert same(receiver.tensors, model)
    step(model)
    later = DeltaSender(tmp_path, base={n: w.clone() for n, w in receiver.tensors.items()})
    assert later.send(model.named_parameters()).number == 2
    receiver.catch_up(tmp_path)
    assert same(receiver.tensors, model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(30, 8)
        self.last = nn.Linear(8, 30, bias=False)
        self.last.weight = self.first.weight


@pytest.mark.parametrize("way", ["base", "file", "first file"])
@pytest.mark.parametrize("sent", ["pairs", "state dict", "module"])
def test_tied_weights_arrive_under_all_names(tmp_path: Path, way: str, sent: str) -> None:
    model, folder = Tied(), tmp_path / "sync"
    base: Any = {"base": model, "file": tmp_path / "m.sfp", "first file": None}[way]
    save_model(model, tmp_path / "m.sfp")
    sender, receiver = DeltaSender(folder, base=base), DeltaReceiver(base)
    if base is None:
        sender.send(model)
    for _ in range(2):
        step(model)
        ways: Any = {"pairs": model.named_parameters(), "state dict": model.state_dict(), "module": model}
        sender.send(ways[sent])
        receiver.catch_up(folder)
        assert same(receiver.tensors, model)
    step(model)
    sender.send(model)
    assert set(receiver.catch_up(folder)) == {"first.weight", "last.weight"}
    worker = Tied()
    worker.load_state_dict(dict(receiver.tensors))
    assert same(receiver.tensors, worker)


def test_names_that_are_unknown_and_ties_that_differ_are_refused(tmp_path: Path) -> None:
    model = Tied()
    sender = DeltaSender(tmp_path, base=model)
    cases: list[tuple[Any, str]] = [
        ([("frist.weight", model.first.weight)], "nearest is 'first.weight'; pass add=True"),
        (
            {"first.weight": torch.ones(30, 8), "last.weight": torch.zeros(30, 8)},
            "tied to 'first.weight', but",
        ),
        (iter(()), "was the iterator used before"),
    ]
    for tensors, words in cases:
        with pytest.raises(OptionError, match=words):
            sender.send(tensors)
    assert not list(tmp_path.iterdir())
    assert sender.send([("new", torch.ones(2))], add=True).number == 1


def test_a_new_sender_continues_the_numbers_of_a_folder(tmp_path: Path) -> None:
    model = net()
    DeltaSender(tmp_path).send(model.named_parameters())
    receiver = DeltaReceiver()
    receiver.catch_up(tmp_path)
    later = DeltaSender(tmp_path, base=model)
    step(model)
    assert later.send(model.named_parameters()).number == 2
    receiver.catch_up(tmp_path)
    assert same(receiver.tensors, model)


def test_what_does_not_follow_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = net()
    sender = DeltaSender(tmp_path, base=model)
    receiver, other = DeltaReceiver(model), DeltaReceiver({n: w + 1 for n, w in model.state_dict().items()})
    empty = DeltaReceiver()
    step(model)
    first = sender.send(model.named_parameters())
    with pytest.raises(BaseMismatchError):
        other.catch_up(tmp_path)
    with pytest.raises(OptionError, match="there are no weights yet"):
        empty.catch_up(tmp_path)
    with pytest.raises(OptionError, match="there are no weights yet"):
        _ = empty.tensors
    step(model)
    sender.send(model.named_parameters())
    first.path.rename(tmp_path / "elsewhere")
    with pytest.raises(OptionError, match="not the file before it, number 1"):
        receiver.catch_up(tmp_path)
    assert receiver.number == other.number == 0
    with pytest.raises(OptionError, match="was already sent"):
        sender.send([("0.weight", torch.ones(2)), ("0.weight", torch.ones(2))])
    assert len(list(tmp_path.iterdir())) == 2
    step(model)
    assert sender.send(model.named_parameters()).number == 3


def test_a_folder_with_safetensors_can_be_the_base(tmp_path: Path) -> None:
    model = net()
    (tmp_path / "model").mkdir()
    save_file(model.state_dict(), tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    sender, receiver = (
        DeltaSender(tmp_path / "sync", base=tmp_path / "model"),
        DeltaReceiver(tmp_path / "model"),
    )
    step(model)
    assert not sender.send(model.named_parameters()).whole
    receiver.catch_up(tmp_path / "sync")
    assert same(receiver.tensors, model)


def test_patches_have_the_positions_and_values_that_change(tmp_path: Path) -> None:
    base = {
        "w": torch.arange(12.0).reshape(3, 4),
        "c": torch.ones(4, dtype=torch.complex64),
        "same": torch.ones(2),
    }
    sender, receiver = DeltaSender(tmp_path, base=base), DeltaReceiver(base)
    new = {name: tensor.clone() for name, tensor in base.items()}
    new["w"][1, 2] = -1
    new["c"][3:] = torch.tensor([2j])
    patches = receiver.read(sender.send(new).path)
    assert patches.keys() == {"w", "c"}
    for name, position in (("w", 6), ("c", 3)):
        positions = patches[name].positions
        assert positions is not None
        assert positions.tolist() == [position]
        assert torch.equal(patches[name].values, new[name].view(-1)[position : position + 1])
        assert patches[name].shape == base[name].shape
    assert torch.equal(receiver.tensors["w"], base["w"])


# ------------------------------------------------------------------------------------- transformers and TRL


def test_a_trainer_of_transformers_sends_each_step(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": nn.functional.cross_entropy(self.inner(x), labels)}

    model = Model()
    receiver = DeltaReceiver(model)
    callback = WeightSyncCallback(DeltaSender(tmp_path / "sync", base=model), every=2)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data: Any = [{"x": torch.randn(4), "labels": i % 2} for i in range(12)]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    assert [sent.number for sent in callback.sent] == [1, 2, 3]
    assert receiver.catch_up(tmp_path / "sync") == ["inner.weight", "inner.bias"]
    assert same(receiver.tensors, model)
    with pytest.raises(OptionError, match="every is 0"):
        WeightSyncCallback(DeltaSender(tmp_path / "sync"), every=0)


class Client:
    """A stand-in for `VLLMClient` of TRL 1.16. Records the calls."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def _call(self, name: str, value: Any = None) -> None:
        self.calls.append((name, value))
        if name == self.fails:
            raise RuntimeError(f"{name} failed")

    def wait_for_server_ready(self, poll_interval_s: float = 2.0) -> None:
        self._call("wait")

    def pause(self, timeout: int = 1800) -> None:
        self._call("pause")

    def resume(self, timeout: int = 1800) -> None:
        self._call("resume")

    def init_weight_transfer_engine(self, init_info: dict[str, Any], timeout: int = 1800) -> None:
        self._call("init", init_info)

    def start_weight_update(self, timeout: int = 1800) -> None:
        self._call("start")

    def update_weights(self, update_info: dict[str, Any], timeout: int = 1800) -> None:
        self._call("update", update_info)

    def finish_weight_update(self, timeout: int = 1800) -> None:
        self._call("finish")


def synchronised(transfer: DeltaWeightTransfer, model: nn.Module) -> None:
    """Synchronises as `AsyncGRPOTrainer` does."""
    transfer.pause()
    transfer.send_weights(iter(model.named_parameters()))
    transfer.resume()


def test_a_transfer_of_trl_makes_the_server_read_each_file(tmp_path: Path) -> None:
    model, client = net(), Client()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    transfer = DeltaWeightTransfer(tmp_path / "sync", base=tmp_path / "model.safetensors", client=client)
    transfer.init_weight_transfer()
    receiver = DeltaReceiver(model)
    for _ in range(2):
        step(model)
        synchronised(transfer, model)
    transfer.destroy()
    once = ["pause", "start", "update", "finish", "resume"]
    assert [name for name, _ in client.calls] == ["wait", "init", *once, *once]
    assert client.calls[1][1] == {"base": str(tmp_path / "model.safetensors")}
    paths = [value["path"] for name, value in client.calls if name == "update"]
    for path in paths:
        receiver.apply(path)
    assert same(receiver.tensors, model)


def test_all_weights_are_sent_after_a_failure_of_the_server(tmp_path: Path) -> None:
    model, client = net(), Client("update")
    transfer = DeltaWeightTransfer(tmp_path, client=client)
    with pytest.raises(RuntimeError, match="update failed"):
        synchronised(transfer, model)
    client.fails = ""
    synchronised(transfer, model)
    receiver = DeltaReceiver()
    receiver.apply(client.calls[-3][1]["path"])
    assert same(receiver.tensors, model)


def test_other_interfaces_of_trl_are_refused_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: Any = object()
    with pytest.raises(MismatchError, match=r"no method 'wait_for_server_ready'.*VLLMClient of TRL 1\.16"):
        DeltaWeightTransfer(tmp_path, client=wrong)
    with pytest.raises(MismatchError, match="give the path"):
        DeltaWeightTransfer(tmp_path, base=net(), client=Client())

    class Protocol:
        def init_weight_transfer(self) -> None: ...

        def send_patches(self) -> None: ...

    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace())
    monkeypatch.setitem(sys.modules, _TRL, SimpleNamespace())
    with pytest.raises(MismatchError, match=r"has no WeightTransferProtocol; .* for TRL 1\.16"):
        require_interface()
    monkeypatch.setitem(sys.modules, _TRL, SimpleNamespace(WeightTransferProtocol=Protocol))
    with pytest.raises(MismatchError, match="also calls 'send_patches'"):
        DeltaWeightTransfer(tmp_path).init_weight_transfer()
