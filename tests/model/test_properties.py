"""What must hold for any grid, patch size and number of channels."""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_nb.base.keyed import key, uniform, uniforms
from mae_nb.model.encoder import Encoder
from mae_nb.model.mae import create_mae
from mae_nb.model.masking import gather_tokens, mask_from_order, num_keep, random_mask
from mae_nb.model.patches import patchify, unpatchify

side = st.integers(1, 6)
settings.register_profile('short', max_examples=50, deadline=None)
settings.load_profile('short')

@given(rows=side, cols=side, p=st.integers(1, 5), c=side, b=st.integers(1, 3))
def test_unpatchify_inverts_patchify(rows, cols, p, c, b):
    imgs = torch.randn(b, c, rows * p, cols * p)
    assert torch.equal(unpatchify(patchify(imgs, p), p, (rows, cols)), imgs)

@given(b=st.integers(1, 4), n=st.integers(2, 300), ratio=st.floats(.01, .99))
def test_a_mask_removes_exactly_the_stated_number(b, n, ratio):
    k = int(n * (1 - ratio))
    if not 0 < k < n:
        return
    m = random_mask(torch.rand(b, n), (1, n), ratio)
    assert num_keep(n, ratio) == k
    assert m.ids_keep.shape == (b, k)
    assert (m.mask.sum(dim=1) == n - k).all()
    assert (m.mask.gather(1, m.ids_keep) == 0).all()

@given(b=st.integers(1, 3), n=st.integers(1, 50))
def test_shuffle_then_unshuffle_is_the_identity(b, n):
    x, ids = torch.randn(b, n, 2), torch.rand(b, n).argsort(dim=1)
    m = mask_from_order(ids, n)
    assert torch.equal(gather_tokens(gather_tokens(x, ids), m.ids_restore), x)

@given(rows=side, cols=side, c=st.integers(1, 4))
def test_nothing_masked_gives_all_tokens_in_image_order(rows, cols, c):
    img_size, n = (rows * 4, cols * 4 + 4), rows * (cols + 1)
    options = dict(img_size=img_size, in_chans=c, mask_ratio=.5, dim=16, depth=1, num_heads=2)
    model = create_mae('mae_vit_nano_patch4_28', **options)
    imgs = torch.randn(2, c, *img_size)
    tokens = model.encode(imgs)
    assert tokens.shape == (2, n + 1, 16)
    order = torch.rand(2, n).argsort(dim=1)   # the same patches in another order
    shuffled = Encoder.forward(model.encoder, imgs, mask_from_order(order, n))
    assert torch.allclose(shuffled[:, 1:], gather_tokens(tokens[:, 1:], order), atol=1e-5)

numbers = st.integers(0, 2**31)

@given(seed=numbers, epoch=st.integers(0, 2000), ids=st.lists(numbers, min_size=1, max_size=8))
def test_keyed_numbers_do_not_depend_on_the_batch(seed, epoch, ids):
    batch = uniform(key(seed, epoch, torch.tensor(ids), 'mask'), 5)
    assert batch.tolist() == [uniforms(key(seed, epoch, i, 'mask'), 5) for i in ids]
    reverse = uniform(key(seed, epoch, torch.tensor(ids[::-1]), 'mask'), 5)
    assert torch.equal(reverse, batch.flip(0))
