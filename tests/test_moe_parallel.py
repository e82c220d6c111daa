"""Experts spread over two processes compute what one process computes: log-probs, loss and gradients."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

import torch.distributed as dist  # noqa: E402
from small_models import write_model  # noqa: E402
from test_dense_trainer import sequences  # noqa: E402

from suite.engines.batch import in_one_shape, pad_sequences  # noqa: E402
from suite.engines.trainers import megatron_cpu  # noqa: E402
from suite.engines.trainers.megatron_names import experts_of, parted, read_shape, read_weights, table  # noqa: E402
from suite.errors import UserError  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.skipif(torch.cuda.is_available(), reason="two processes of the CPU; a node has its own test")]
SHARES = [slice(0, 4), slice(4, 5)]  # of five sequences: unequal, and the second rank has the longest


def rows_of():
    return sorted(sequences(5), key=lambda row: len(row[0]))


def gradients(folder, rows, shape_of_batch, num_tokens, group=None):
    """(log-probs of the response tokens, {hub name: gradient of their mean's negative}) of the parameters held here."""
    megatron_cpu.apply()
    from suite.engines.trainers import megatron

    shape = read_shape(folder)
    experts = experts_of(shape, group.rank(), group.size()) if group else None
    model = megatron.build(shape, torch.float32, group).train()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in read_weights(folder, shape, experts):
            parameters[name].copy_(value)
    padded = in_one_shape(pad_sequences(rows, len(rows)), *shape_of_batch)
    ids, mask = torch.from_numpy(padded.token_ids), torch.from_numpy(padded.response_mask)
    hidden = megatron.hidden_states(model, ids)[:, :-1][mask[:, 1:]]
    logprobs = (hidden @ model.output_layer.weight.T).log_softmax(-1).gather(1, ids[mask][:, None])[:, 0]
    (-logprobs.sum() / num_tokens).backward()
    found = {}
    for row in table(shape, experts):
        gradient = parameters[row.parameter].grad
        gradient = torch.zeros_like(parameters[row.parameter]) if gradient is None else gradient
        if group and ".experts." not in row.parameter:
            dist.all_reduce(gradient, group=group)  # every rank has these, and saw its own sequences
        found |= dict(parted(row, gradient, shape))
    return logprobs.detach(), found


def one_rank(rank, folder, store, out):
    """What a process of two does; imported by name in the child."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = rows_of()
    share, longest = rows[SHARES[rank]], pad_sequences(rows, 5).token_ids.shape[1]
    num_tokens = sum(len(tokens) - num_prompt for tokens, num_prompt in rows)
    torch.save(gradients(folder, share, (4, longest), num_tokens, dist.group.WORLD), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_experts_on_two_ranks_give_the_log_probs_and_gradients_of_one_process(tmp_path):
    folder, rows = write_model(tmp_path / "model", experts=True), rows_of()
    num_tokens = sum(len(tokens) - num_prompt for tokens, num_prompt in rows)
    torch.multiprocessing.spawn(one_rank, (folder, tmp_path / "store", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    logprobs, expected = gradients(folder, rows, (5, pad_sequences(rows, 5).token_ids.shape[1]), num_tokens)
    assert (torch.cat([one for one, _ in ranks]) - logprobs).abs().max() < 1e-5
    experts = [{name for name in found if ".experts." in name} for _, found in ranks]
    assert experts[0].isdisjoint(experts[1]) and len(experts[0]) == len(experts[1])
    found = ranks[1][1] | ranks[0][1]
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    for name in set(expected) - experts[0] - experts[1]:
        assert torch.equal(ranks[0][1][name], ranks[1][1][name]), name


def test_experts_that_the_ranks_do_not_divide_are_refused(tmp_path):
    megatron_cpu.apply()
    from suite.engines.trainers import megatron

    class Three:
        def size(self):
            return 3

    with pytest.raises(UserError, match="train.parallel.expert: found 3, allowed: a divisor of the model's 4 experts"):
        megatron.build(read_shape(write_model(tmp_path, experts=True)), torch.float32, Three())


def test_a_batch_is_padded_to_the_shape_of_the_widest_rank_without_anything_to_score():
    small = pad_sequences([([5, 6, 7], 1)], 1)
    padded = in_one_shape(small, 3, 32)
    assert padded.token_ids.shape == padded.response_mask.shape == (3, 32)
    assert padded.token_ids[0, :3].tolist() == [5, 6, 7] and padded.response_mask.sum() == 2
    assert np.array_equal(padded.response_mask[:1, :16], small.response_mask)
    with pytest.raises(ValueError, match="at most"):
        in_one_shape(padded, 2, 32)
