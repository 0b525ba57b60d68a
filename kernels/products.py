"""Products of rows with weight matrices, x W^T: plain torch, or on a CPU by oneDNN with weights
that were packed once.

Few rows, as in decode, leave a matrix product little work for each weight. Plain torch copies the
weights to the layout of its inner loop in every call. oneDNN keeps them in that layout: 1.2 to 2.3
times as fast at 24 rows of a small model (2 cores, AVX2, float32).

    python -m pytest test_neo.py -k packed
"""
import torch
import torch.nn.functional as F

PACKED_FOR = 64     # rows; oneDNN chooses a layout for it, and takes any number of rows with it


class Plain:
    """Weights as they lie, and the reference of Packed."""

    @staticmethod
    def pack(weight):
        """[out, in] -> what the methods below take as weight."""
        return weight

    @staticmethod
    def linear(x, weight, bias=None, out=None):
        """x [N, in] -> x W^T + bias [N, out], in `out` if given; out has x's dtype."""
        if out is None:
            return F.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

    @staticmethod
    def add_linear_(x, h, weight, keep=True):
        """x [N, out] = x + h [N, in] W^T; keep False: without x."""
        x.addmm_(h, weight.t(), beta=int(keep))


class Packed:
    """oneDNN's operators, those that torch.compile calls; weights are opaque tensors."""

    @staticmethod
    def pack(weight):
        return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)

    @staticmethod
    def linear(x, weight, bias=None, out=None):
        result = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result if out is None else out.copy_(result)

    @staticmethod
    def add_linear_(x, h, weight, keep=True):
        if keep:
            x.copy_(torch.ops.mkldnn._linear_pointwise.binary(h, x, weight, None, "add"))
        else:
            Packed.linear(h, weight, out=x)


def can_pack(device, dtype):
    """Has this CPU packed products in this dtype? device, dtype: torch's."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return (dtype == torch.float32
            or dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()
            or dtype == torch.float16 and ops._is_mkldnn_fp16_supported())
