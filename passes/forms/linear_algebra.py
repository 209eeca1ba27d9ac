"""The few exact solutions that fits are made of, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from recast.passes.forms.operator import Operator
from recast.passes.forms.stats import Stats

__all__ = [
    "behind",
    "best_left",
    "gram_root",
    "inverse_factor",
    "leading_subspace",
    "output_gram",
    "pseudo_inverse",
    "scaled_copy",
    "solve_consistent",
    "solve_positive",
    "times",
    "turn",
]

# Below this fraction of the largest eigenvalue, a direction of the data counts as never seen.
CUTOFF = 1e-10

# Weights with both sides above this, of which at most a quarter of the directions is asked for, are solved by sketching.
LARGE = 2048
# (Three products with as many vectors as asked for are as good and take a quarter longer.)
_PRODUCTS = 10
# Smallest of the wanted eigenvalues over the largest, of which products in float32 can be trusted.
_RESOLVED = 1e-4

# Rows of a weight that are converted to float64 at once.
_ROWS = 512
# Numbers that fit into a core's cache.
_CACHED = 1 << 16

_ROOTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def pseudo_inverse(gram: Tensor) -> Tensor:
    """Invert a symmetric positive semi-definite matrix (n, n) on the directions above the cutoff, in float64.

    By Cholesky, a tenth of the work, where that shows that all of them are: the smallest eigenvalue is at least one over the
    norm of the inverse, the largest at most the norm of the matrix.
    """
    lower, failed = torch.linalg.cholesky_ex(gram.double())
    if int(failed) == 0:
        inverse = torch.cholesky_inverse(lower)
        if float(inverse.norm()) * float(gram.double().norm()) * CUTOFF < 1:  # false for infinities and NaN
            return inverse
    del lower
    values, vectors = torch.linalg.eigh(gram.double())
    keep = values > CUTOFF * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    vectors.mul_(torch.where(keep, torch.where(keep, values, 1).rsqrt(), 0))
    found: Tensor = vectors @ vectors.T
    return found


def solve_consistent(right: Tensor, gram: Tensor) -> Tensor:
    """Find ``R G⁺``, float64, for a right side R (m, n) whose rows lie in the range of G (n, n), as those of W G do.

    Large matrices get a ridge ρ at the cutoff and one step of refinement, which is ``X₁ = R (G + ρ)⁻¹`` and
    ``X₁ + ρ X₁ (G + ρ)⁻¹``: directions that the data shows come out as they should to the square of the ridge's share, and R
    has no others. Beside its two arguments there is one more matrix of each of their sizes.
    """
    if len(gram) <= LARGE:
        return right @ pseudo_inverse(gram)
    ridge = CUTOFF * gram.norm(dtype=torch.float64).clamp_min(torch.finfo(torch.float64).tiny)
    while True:
        shifted = gram.to(torch.float64, copy=True)
        shifted.diagonal().add_(ridge)
        lower = _factor(shifted)
        if lower is not None:
            break
        ridge *= 100  # only rounding can have made it indefinite
    del shifted
    found = _solved_rows(right.to(torch.float64, copy=True), lower)
    return found.add_(_solved_rows(found.clone(), lower), alpha=float(ridge))


def _solved_rows(rows: Tensor, lower: Tensor) -> Tensor:
    """``R (L Lᵀ)⁻¹`` for rows (m, n), which are overwritten, and a lower Cholesky factor; both float64."""
    if rows.device.type == "cpu":
        import scipy.linalg.lapack

        # Transposes are what Fortran reads; torch's own would copy the factor.
        solved, _ = scipy.linalg.lapack.dpotrs(lower.numpy().T, rows.contiguous().numpy().T, lower=0, overwrite_b=1)
        return torch.from_numpy(solved.T)
    return torch.cholesky_solve(rows.mT, lower).mT


def inverse_factor(gram: Tensor, damping: float, dead: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Find the upper triangular U with ``c H⁻¹ = Uᵀ U``, in float64, of a damped Gram matrix H; c is its mean diagonal.

    Parameters
    ----------
    gram
        (n, n), positive semi-definite.
    damping
        Added to the diagonal, as a fraction of its mean; more where that is not enough to factor it.
    dead
        The diagonal of inputs that are always zero, damping included, as a fraction of the mean.
    dtype
        What U is returned in, float64 or float32.
    """
    mean = float(gram.diagonal().double().mean())
    if not mean > 0:
        return torch.eye(len(gram), dtype=dtype, device=gram.device)
    while True:
        # H = V Vᵀ with V upper triangular is a Cholesky factorisation from the other end, and U the inverse of V.
        turned = turn(gram.to(torch.float64, copy=True)).div_(mean)
        diagonal = turned.diagonal()
        unseen = diagonal <= 0
        diagonal.add_(damping).masked_fill_(unseen, dead)
        inverse = _inverse_of_factor(turned)
        if inverse is not None:
            return _converted(turn(inverse), dtype)
        damping = max(10 * damping, 1e-8)  # statistics of few tokens need more than what was asked for


def _converted(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a float64 matrix to float32 where it lies: of a large one there is no second."""
    if dtype != torch.float32 or not matrix.is_contiguous():
        return matrix.to(dtype)
    flat, step = matrix.view(-1), 1 << 20
    narrow = flat.view(torch.float32)[: len(flat)]
    for start in range(0, len(flat), step):  # what is written has been read: it is half as wide
        narrow[start : start + step] = flat[start : start + step].float()
    return narrow.view(matrix.shape)


def turn(matrix: Tensor) -> Tensor:
    """Reverse the order of rows and of columns in place: of a large matrix `flip` would make a second one.

    Examples
    --------
    >>> turn(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[4.0, 3.0], [2.0, 1.0]]
    """
    if not matrix.is_contiguous():
        return matrix.flip(0, 1)
    flat, step = matrix.view(-1), 1 << 20
    half = len(flat) // 2
    for start in range(0, half, step):
        end = min(start + step, half)
        head, tail = flat[start:end], flat[len(flat) - end : len(flat) - start]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)
    return matrix


def _factor(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a matrix, which is overwritten; None if it is not positive definite."""
    if matrix.device.type == "cpu":
        import scipy.linalg.lapack

        # Symmetric, so that its transpose is the same matrix in Fortran's order.
        factor, info = scipy.linalg.lapack.dpotrf(matrix.numpy().T, lower=0, overwrite_a=1, clean=1)
        return torch.from_numpy(factor.T) if info == 0 else None
    lower, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) else lower


def _inverse_of_factor(matrix: Tensor) -> Tensor | None:
    """Invert the lower Cholesky factor of a matrix, which is overwritten; None if it is not positive definite."""
    lower = _factor(matrix)
    if lower is None:
        return None
    if matrix.device.type == "cpu":
        # In place, or the largest matrices would be there four times; the inverse costs a third of solving for it.
        import scipy.linalg.lapack

        factor, info = scipy.linalg.lapack.dtrtri(lower.numpy().T, lower=0, overwrite_c=1)
        return torch.from_numpy(factor.T) if info == 0 else None
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse


def _leading_eigenvectors(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return the `rank` largest eigenvalues, descending, and their vectors (d, rank); None asks for all."""
    size = matrix.shape[0]
    if matrix.device.type == "cpu" and rank is not None and size > 1024 and 3 * rank <= size:
        # Two cores, size 4096: a quarter of the spectrum takes 6 s, a half 16 s, the whole by divide and conquer 11 s.
        import scipy.linalg

        values, vectors = scipy.linalg.eigh(
            matrix.numpy(), subset_by_index=(size - rank, size - 1), driver="evr", check_finite=False
        )
        return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)
    all_values, all_vectors = torch.linalg.eigh(matrix)
    return all_values.flip(0)[:rank], all_vectors.flip(1)[:, :rank]


def _sketched(w: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues, descending, and vectors (m, rank) of ``C = W G Wᵀ`` without ever forming it.

    Ten products of C with a quarter as many vectors as asked for, beginning with fixed random ones, the next orthogonal to
    those before (block Krylov space; Musco and Musco 2015); of all of them its Nyström approximation gives the vectors
    (Tropp, Yurtsever, Udell and Cevher 2017). Deterministic; what it leaves is within six tenths of a percent of the
    optimum, also where the spectrum is flat. Products are in float32, unless the spectrum spans more than that resolves.
    """
    if max(w.dtype.itemsize, 4) == 4:
        values, vectors = _krylov(w, gram, rank, torch.float32)
        if float(values[-1]) > _RESOLVED * float(values[0]):
            return values, vectors
    return _krylov(w, gram, rank, torch.float64)


def _width(rank: int) -> int:
    return -(-rank // 4)


def _krylov(w: Tensor, gram: Tensor | None, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues, descending, and vectors of a Nyström approximation of ``W G Wᵀ``; products are in `dtype`."""
    weight = scaled_copy(w, w.abs().max(), dtype)
    middle = None if gram is None else scaled_copy(gram, gram.diagonal().max(), dtype)
    width = _width(rank)
    start = torch.randn(w.shape[0], width, dtype=torch.float32, device=w.device, generator=_fixed(w.device))
    basis, products = torch.linalg.qr(start.to(dtype)).Q, []
    for _ in range(_PRODUCTS):
        back = weight.T @ basis[:, -width:]
        product = weight @ (back if middle is None else middle @ back)
        products.append(product)
        if len(products) < _PRODUCTS:
            for _ in range(2):  # once leaves what rounding brings back
                product = product - basis @ (basis.T @ product)
            basis = torch.cat([basis, torch.linalg.qr(product).Q], 1)
    del weight, middle
    image, wide = torch.cat(products, 1).double(), basis.double()
    inner = _symmetric(wide.T @ image)
    # What rounding leaves in the products bounds how small an eigenvalue can be told from zero.
    noise = inner.diagonal().max() * 4 * len(w) ** 0.5 * torch.finfo(dtype).eps
    root, failed = torch.linalg.cholesky_ex(inner + noise * torch.eye(len(inner), dtype=inner.dtype, device=w.device))
    if bool(failed):
        values, turned = torch.linalg.eigh(inner)
        half = image @ (turned * torch.where(values > noise, values, torch.inf).rsqrt())
    else:
        half = torch.linalg.solve_triangular(root.T, image, upper=True, left=False)
    squares, mixed = torch.linalg.eigh(_symmetric(half.T @ half))
    vectors = torch.linalg.qr(half @ mixed.flip(1)[:, :rank]).Q
    return squares.flip(0)[:rank].clamp_min(0), vectors


def scaled_copy(matrix: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide a matrix by a number, in float64, and convert it: a few rows at a time, or both copies would be large."""
    size = size.double().clamp_min(torch.finfo(torch.float64).tiny)
    found = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    step = max(1, _CACHED // matrix.shape[1])
    for start in range(0, len(matrix), step):
        found[start : start + step] = matrix[start : start + step].double() / size
    return found


def leading_subspace(
    weight: Tensor, gram: Tensor | None, *, rank: int | None = None, energy: float = 1.0, solver: str = "auto"
) -> Tensor:
    """Find the output directions that keep most of ``W X``: an orthonormal E (m, r), so that ``E Eᵀ W`` is optimal.

    Truncating the SVD of W S, with ``G = S Sᵀ``, and multiplying by the inverse of S projects W on the leading left
    singular vectors of W S: the eigenvectors of the output Gram matrix ``W G Wᵀ``. No inverse of S is taken, so a
    singular G does no harm. The eigenproblem is solved on the smaller side: (m, m), or (n, n) as ``Sᵀ Wᵀ W S`` whose
    vectors W S carries over.

    Parameters
    ----------
    weight
        (m, n).
    gram
        (n, n) or None for the plain SVD.
    rank, energy
        The number of directions, or else the fraction of ``‖W X‖²`` that they keep at least.
    solver
        ``exact``; ``randomized``, which needs a rank of at most two fifths of the smaller side, or is exact; ``auto`` takes
        the second where the weight is large (`LARGE`) and the rank at most a quarter of its smaller side.
    """
    m, n = weight.shape
    large = solver == "randomized" or (solver == "auto" and min(m, n) > LARGE and 4 * (rank or m) <= min(m, n))
    # (A space as large as the weight itself saves nothing.)
    if large and rank is not None and _PRODUCTS * _width(rank) <= min(m, n):
        values, vectors = _sketched(weight, None if gram is None else gram.double(), rank)
        basis = vectors[:, : _kept(values, rank, energy, max(m, n))]
    elif m <= n:
        values, vectors = _leading_eigenvectors(output_gram(weight, gram), rank)
        basis = vectors[:, : _kept(values, rank, energy, max(m, n))].clone()  # not a view: the rest goes
    else:
        inner = output_gram(weight.T)
        root = None if gram is None else gram_root(gram)
        values, vectors = _leading_eigenvectors(inner if root is None else _symmetric(root.T @ inner @ root), rank)
        vectors = vectors[:, : _kept(values, rank, energy, max(m, n))]
        # The columns come out orthogonal but for rounding, largest first, so QR changes lengths and signs only.
        basis = torch.linalg.qr(times(weight, vectors if root is None else root @ vectors)).Q
    missing = 0 if rank is None else rank - basis.shape[1]
    if missing > 0:
        # The data leaves these directions free: they go to what is left of the weight itself.
        w = weight.double()
        rest = w - basis @ (basis.T @ w)
        if gram is not None:
            more = leading_subspace(rest, None, rank=missing, solver=solver)
        else:
            more = torch.randn(m, missing, dtype=w.dtype, device=w.device, generator=_fixed(w.device))
        joined = torch.linalg.qr(torch.cat([basis, more], 1)).Q
        basis = torch.cat([basis, joined[:, basis.shape[1] :]], 1)
    return basis


def solve_positive(systems: Tensor, right: Tensor) -> Tensor:
    """Solve positive definite systems (..., k, k) for right sides (..., k, r).

    By Cholesky, and not only for speed: with its threads set by `torch.set_num_threads`, torch 2.13 with oneMKL solves
    batches of systems beyond 150 unknowns by LU wrongly, most often in silence. Systems that rounding has made singular get
    a larger ridge, relative to their diagonal.
    """
    largest = systems.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    size = torch.where(largest > 0, largest, 1)
    eye = torch.eye(systems.shape[-1], dtype=systems.dtype, device=systems.device)
    root, failed = torch.linalg.cholesky_ex(systems)
    ridge = torch.finfo(systems.dtype).eps * systems.shape[-1]
    while bool(failed.any()) and ridge < 1:
        ridge *= 1e3
        more = torch.where(failed != 0, ridge * size, 0)
        root, failed = torch.linalg.cholesky_ex(systems + more[..., None, None] * eye)
    return torch.cholesky_solve(right, root)


def times(weight: Tensor, other: Tensor) -> Tensor:
    """``W @ other`` in the dtype of `other`; W (m, n) is converted a few rows at a time, never as a whole."""
    if weight.dtype == other.dtype:
        return weight @ other
    if not weight.is_contiguous() and weight.T.is_contiguous():
        # Rows of the transpose are stretches of memory, which convert several times as fast as its columns.
        parts = zip(torch.split(weight.T, _ROWS), torch.split(other, _ROWS), strict=True)
        found = torch.zeros(weight.shape[0], other.shape[1], dtype=other.dtype, device=other.device)
        for rows, some in parts:
            found.addmm_(rows.to(other.dtype).T, some)
        return found
    found = torch.empty(weight.shape[0], other.shape[1], dtype=other.dtype, device=other.device)
    for rows, out in zip(torch.split(weight, _ROWS), torch.split(found, _ROWS), strict=True):
        torch.mm(rows.to(other.dtype), other, out=out)
    return found


def output_gram(weight: Tensor, gram: Tensor | None = None) -> Tensor:
    """``W G Wᵀ`` (m, m) in float64, a block of rows at a time: a large W is never copied to float64 as a whole."""
    blocks = torch.split(weight, _ROWS)
    found = torch.empty(len(weight), len(weight), dtype=torch.float64, device=weight.device)
    for i, upper in enumerate(blocks):
        weighted = upper.double() if gram is None else upper.double() @ gram.double()
        rows = slice(i * _ROWS, i * _ROWS + len(upper))
        for j, lower in enumerate(blocks[i:], i):
            columns = slice(j * _ROWS, j * _ROWS + len(lower))
            product = weighted @ lower.double().T
            if i == j:
                product = _symmetric(product)
            found[rows, columns] = product
            found[columns, rows] = product.T
    return found


def gram_root(gram: Tensor) -> Tensor:
    """A square root S of a Gram matrix, ``G = S Sᵀ``; kept while the matrix lives, since fits that take turns ask again."""
    held: Tensor | None = _ROOTS.get(gram)  # type: ignore[no-untyped-call]
    if held is None:
        scales, directions = torch.linalg.eigh(gram.double())
        held = _ROOTS[gram] = directions.mul_(scales.clamp_min(0).sqrt())
    return held


def _kept(values: Tensor, rank: int | None, energy: float, size: int) -> int:
    """Count the eigenvalues to keep: those above rounding, and with no rank asked, enough of them for the energy."""
    positive = values.clamp_min(0)
    significant = int((positive > positive[0] * size * torch.finfo(torch.float64).eps).sum())
    if rank is not None:
        return min(rank, significant)
    share = positive.cumsum(0) / positive.sum().clamp_min(torch.finfo(torch.float64).tiny)
    enough = int((share < energy).sum()) + 1
    return max(1, min(enough, significant))


def _fixed(device: torch.device) -> torch.Generator:
    # A weight of lower rank than asked has nothing to say about the remaining directions; any will do, always the same.
    return torch.Generator(device=device).manual_seed(0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def behind(right: Operator, stats: Stats | None) -> tuple[Stats, Tensor]:
    """Return the statistics of what leaves the right factor, and their Gram matrix; without data, of white inputs."""
    if stats is not None and stats.gram is not None:
        seen = stats.through(right)
        if seen.gram is not None:
            return seen, seen.gram
    dense = right.to_dense().detach().double()
    gram = _symmetric(dense @ dense.T)
    return Stats.from_gram(gram), gram


def best_left(weight: Tensor, right: Operator, stats: Stats | None, seen: Tensor) -> Tensor:
    """Find the L (m, k) that minimises ``‖(W - L R) X‖``: ``W G Rᵀ (R G Rᵀ)⁺``, float64; `seen` is R G Rᵀ."""
    dense = right.to_dense().detach().double()
    weighted = weight.double() @ (dense.T if stats is None or stats.gram is None else stats.gram.double() @ dense.T)
    return solve_consistent(weighted, seen)
