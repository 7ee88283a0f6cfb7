"""Norm, rotation and attention as one op: against the formula, its gradients, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F

from opensora_fast.kernels import attention, backend
from opensora_fast.kernels.attention import rope_attention, single_rope_attention, split_rope_attention

H, K = 2, 36
each_backend = pytest.mark.parametrize("name", ["reference", "cpu_flash"])


def inputs(lengths, dtype, B=2, strided=False):
    """qkv of every stream, (q, k) scales of every stream, cos, sin."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    if strided:  # as the single blocks' projection gives it
        streams = [random(B, T, 3 * H * K + 5)[..., : 3 * H * K].unflatten(-1, (3, H, K)) for T in lengths]
    else:
        streams = [random(B, T, 3, H, K) for T in lengths]
    scales = [random(K).abs() + 0.5 for _ in range(2 * len(lengths))]
    leaves = [x.to(dtype).requires_grad_() for x in (*streams, *scales)]
    angle = random(B, sum(lengths), K // 2)
    return leaves, (angle.cos().to(wide), angle.sin().to(wide))


def fused(leaves, tables):
    if len(leaves) == 3:
        return single_rope_attention(*leaves, *tables)
    return rope_attention(*leaves, *tables)


def composite(leaves, tables):
    """The formula, in the dtype of the inputs."""
    num_streams = len(leaves) // 3
    streams, scales = leaves[:num_streams], leaves[num_streams:]
    cos, sin = (table[:, :, None].to(leaves[0].dtype) for table in tables)
    parts = []
    for stream, q_scale, k_scale in zip(streams, scales[::2], scales[1::2], strict=True):
        q, k, v = stream.unbind(2)
        q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s for x, s in ((q, q_scale), (k, k_scale)))
        parts.append((q, k, v))
    q, k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    if leaves[0].dtype != torch.float64:  # what PyTorch makes of it
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (turned(q), turned(k), v))).transpose(1, 2)
    weights = torch.einsum("bqhk,bshk->bhqs", turned(q), turned(k)).div(K**0.5).softmax(dim=-1)
    return torch.einsum("bhqs,bshk->bqhk", weights, v)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(5,), (3, 7), (1, 4)], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_forward_and_gradients(name, dtype, lengths, strided, assert_as_exact):
    leaves, tables = inputs(lengths, dtype, strided=strided)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = composite(exact_leaves, [table.double() for table in tables])
    same = composite(leaves, tables)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with backend.forced({"attention": name}):
        out = fused(leaves, tables)
        ours = out, *torch.autograd.grad(out, leaves, grad)
    same = same, *torch.autograd.grad(same, leaves, grad)
    exact = exact, *torch.autograd.grad(exact, exact_leaves, grad.double())
    for number, tensors in enumerate(zip(ours, same, exact, strict=True)):
        assert_as_exact(f"result {number}", *(tensor.detach() for tensor in tensors))


@each_backend
def test_gradients_in_float64(name):
    leaves, tables = inputs((2, 3), torch.float64, B=1)
    with backend.forced({"attention": name}):
        assert torch.autograd.gradcheck(lambda *leaves: fused(leaves, tables), leaves)


def test_opcheck():
    leaves, tables = inputs((2, 3), torch.float32)
    for split in (False, True):
        torch.library.opcheck(attention._rope_attention, (leaves[:2], leaves[2:], *tables, 1e-6, split))


def test_compiles_into_one_node():
    leaves, tables = inputs((2, 3), torch.float32)
    compiled = torch.compile(lambda *leaves: fused(leaves, tables), fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), fused(leaves, tables)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_keeps_the_projections_and_its_output_alone():
    leaves, tables = inputs((3, 7), torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = fused(leaves, tables)
    allowed = {t.data_ptr() for t in (*leaves, *tables, out)}
    others = [tensor for pointer, tensor in kept.items() if pointer not in allowed]
    assert [tuple(tensor.shape) for tensor in others] == [(2, H, 10)], "the log-sum-exp"


def test_split_is_the_joint_result_in_parts_that_are_kept_once():
    leaves, tables = inputs((3, 7), torch.float32)
    joint = fused(leaves, tables)
    parts = split_rope_attention(*leaves, *tables)
    assert torch.equal(torch.cat(parts, dim=1), joint)
    grad = torch.randn_like(joint)
    ours = torch.autograd.grad(parts, leaves, [part.contiguous() for part in grad.split((3, 7), dim=1)])
    for one, other in zip(ours, torch.autograd.grad(joint, leaves, grad), strict=True):
        assert torch.equal(one, other)
    assert all(part.is_contiguous() for part in parts)


def test_order_of_keys_does_not_matter():
    (qkv, q_scale, k_scale), tables = inputs((6,), torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    out = single_rope_attention(qkv, q_scale, k_scale, *tables)
    shuffled = single_rope_attention(qkv[:, order], q_scale, k_scale, *(table[:, order] for table in tables))
    torch.testing.assert_close(shuffled, out[:, order])


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)], ids=["no-tokens", "no-items"])
def test_nothing_in_gives_nothing_out(shape):
    qkv = torch.zeros(*shape, 3, H, K, requires_grad=True)
    scale, table = torch.ones(K, requires_grad=True), torch.zeros(*shape, K // 2)
    out = single_rope_attention(qkv, scale, scale, table, table)
    assert out.shape == (*shape, H, K)
    out.sum().backward()
    assert not scale.grad.any()


def test_gradients_of_any_layout_are_taken():
    leaves, tables = inputs((3, 7), torch.float32)
    out = fused(leaves, tables)
    grad = torch.randn(out.shape)
    transposed = grad.transpose(1, 2).contiguous().transpose(1, 2)
    both = [torch.autograd.grad(out, leaves, one, retain_graph=True) for one in (grad, transposed)]
    assert all(map(torch.equal, *both))


def test_choose_says_why(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    shape = (1, 8, 2, 128)
    assert attention.selected(shape, torch.bfloat16, "cpu")[0] == "cpu_flash"
    missing = attention.missing_backends(shape, torch.bfloat16, "cuda")
    assert attention.choose(shape, torch.bfloat16, "cuda", missing)[0] == "cudnn"
    for other, dtype, named in (((1, 8, 2, 128), torch.float32, "float32"), ((1, 8, 2, 36), torch.float16, "36")):
        missing = attention.missing_backends(other, dtype, "cuda")
        name, reason = attention.choose(other, dtype, "cuda", missing)
        assert name == "reference"
        assert named in reason
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert "cuDNN" in attention.missing_backends(shape, torch.bfloat16, "cuda")["cudnn"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lengths", [(256,), (128, 384)], ids=str)
def test_cudnn_on_the_gpu(lengths, assert_as_exact):
    H, K = 4, 128
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(2, T, 3, H, K, generator=generator) for T in lengths]
    scales = [torch.rand(K, generator=generator) + 0.5 for _ in range(2 * len(lengths))]
    angle = torch.randn(2, sum(lengths), K // 2, generator=generator)
    results = {}
    for key, (name, dtype) in {
        "ours": ("cudnn", torch.bfloat16),
        "same": ("reference", torch.bfloat16),
        "exact": ("reference", torch.float64),
    }.items():
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.bfloat16().to("cuda", dtype).requires_grad_() for x in (*streams, *scales)]
        tables = [table.to("cuda", wide) for table in (angle.cos(), angle.sin())]
        with backend.forced({"attention": name}):
            out = fused(leaves, tables)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
            results[key] = out, *torch.autograd.grad(out, leaves, grad)
    for number, tensors in enumerate(zip(*results.values(), strict=True)):
        assert_as_exact(f"result {number}", *tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_opcheck_on_the_gpu():
    K = 64
    qkv, scale = torch.randn(1, 128, 3, 2, K), torch.ones(K)
    tensors = [x.to("cuda", torch.bfloat16).requires_grad_() for x in (qkv, scale, scale)]
    table = torch.zeros(1, 128, K // 2, device="cuda")
    torch.library.opcheck(attention._rope_attention, (tensors[:1], tensors[1:], table, table, 1e-6, False))


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_cost_counts_every_tensor_once(mode):
    cost = attention.cost(2, 10, H, K, torch.bfloat16, mode)
    tensor, lse = 2 * 10 * H * K * 2, 2 * H * 10 * 4
    assert cost.bytes == (4 if mode == "forward" else 8) * tensor + lse
    assert cost.flops == (2 if mode == "forward" else 5) * 2 * 2 * H * 10 * 10 * K
