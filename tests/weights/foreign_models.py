"""Small models of ours, of timm and of transformers, and files as the official code leaves them."""
import argparse
import pathlib

import torch
from timm.models.vision_transformer import Block, PatchEmbed, VisionTransformer
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mae_nb.model.classifier import create_classifier
from mae_nb.model.mae import create_mae

SIZE = dict(patch_size=16, dim=96, depth=3, num_heads=3)              # a base model, narrowed
DECODER = dict(decoder_dim=64, decoder_depth=2, decoder_heads=4)

def relative(a, b):
    "The relative distance of two tensors."
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()

def same(a, b):
    "Two state dicts agree bit for bit."
    return sorted(a) == sorted(b) and all(torch.equal(a[k], b[k]) for k in a)

def snapshot(model):
    "A copy of a model's tensors."
    return {k: v.clone() for k, v in model.state_dict().items()}

def shaken(model, dtype=torch.float32):
    "Every weight moved a little: biases and norms too must differ from their initial values."
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=.05)
    return model.to(dtype).eval()

def small_mae(**kwargs):
    "A masked autoencoder of ours."
    return create_mae('mae_vit_base_patch16', **SIZE | DECODER | kwargs)

def small_classifier(num_classes=10, **kwargs):
    "A classifier of ours."
    return create_classifier('mae_vit_base_patch16', num_classes, **SIZE | kwargs)

def vit_config(img_size=224, **kwargs):
    "transformers' options of the same encoder."
    size = dict(image_size=img_size, patch_size=16, hidden_size=96, num_hidden_layers=3, num_attention_heads=3,
                intermediate_size=384, layer_norm_eps=1e-6)
    return size | kwargs

def hf_mae(img_size=224, cls=ViTMAEForPreTraining, **kwargs):
    "transformers' masked autoencoder, or its encoder."
    decoder = dict(decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
                   decoder_intermediate_size=256)
    return cls(ViTMAEConfig(**vit_config(img_size, **decoder, **kwargs)))

def timm_vit(img_size=224, num_classes=0, pool='token', **kwargs):
    "timm's encoder or classifier."
    size = dict(img_size=img_size, patch_size=16, embed_dim=96, depth=3, num_heads=3, num_classes=num_classes,
                global_pool=pool, fc_norm=pool == 'avg')
    return VisionTransformer(**size | kwargs)

class OfficialShape(nn.Module):
    "The tensors of the official model under the official names, made of timm's layers; it is never run."
    def __init__(self, dim=96, depth=3, decoder_dim=64, decoder_depth=2, patch=16, img_size=224, chans=3):
        super().__init__()
        n, heads = (img_size // patch)**2, 1
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, n + 1, dim))
        self.patch_embed = PatchEmbed(img_size, patch, chans, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, n + 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, heads, qkv_bias=True) for _ in range(decoder_depth))
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(decoder_dim), nn.Linear(decoder_dim, patch**2 * chans)

ARGS = argparse.Namespace(
    model='mae_vit_base_patch16', norm_pix_loss=True, mask_ratio=.75, input_size=224, batch_size=64, blr=1.5e-4,
    device='cuda', data_path='/data/imagenet', output_dir=pathlib.PosixPath('/checkpoint/mae'), distributed=True, gpu=0)

def official_file(path, state, zipped=True, **args):
    "A checkpoint as the official training script leaves it: tensors, optimizer, loss scaler and the command line."
    moments = dict(step=7, exp_avg=torch.ones(3), exp_avg_sq=torch.ones(3))
    optimizer = dict(state={0: moments}, param_groups=[dict(lr=.1, betas=(.9, .95), params=[0])])
    content = dict(model=state, optimizer=optimizer, epoch=799, scaler=dict(scale=65536., growth_factor=2.),
                   args=argparse.Namespace(**vars(ARGS) | args))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path
