import torch

from nulsq_cli.ops import codebook, normalize


def test_each_row_gets_mean_0_and_deviation_1():
    x = torch.randn(4, 3, 5) * 3 + 2
    for rows in (1, 4):
        y = normalize.standardize(x, *normalize.moments(x, rows)).view(rows, -1)
        torch.testing.assert_close(y.mean(1), torch.zeros(rows), rtol=0, atol=1e-6)
        torch.testing.assert_close(y.std(1), torch.ones(rows))


def test_rows_without_width_stay_finite_with_finite_gradients():
    for x in (torch.zeros(2, 3), torch.ones(2, 1)):
        x.requires_grad_()
        y = normalize.standardize(x, *normalize.moments(x, 2))
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


def test_unfolded_tables_give_raw_weights_the_codes_of_normalised_ones():
    x = torch.randn(3, 200) * torch.tensor([[0.1], [1], [4]]) + 0.3
    thresholds = torch.tensor([-1.0, 0.2, 0.9])
    levels = torch.tensor([-1.5, 0, 0.5, 1.2])
    for rows in (1, 3):
        mean, std = normalize.moments(x, rows)
        tables = (levels, thresholds) if rows == 1 else (levels.expand(3, -1), thresholds.expand(3, -1))
        for rescale in (True, False):
            outer, raw = normalize.unfold(*tables, mean, std, rescale)
            codes = codebook.encode(x, raw)
            assert torch.equal(codes, codebook.encode(normalize.standardize(x, mean, std), thresholds))
            wanted = levels[codes.int()].view(rows, -1) * (std if rescale else 1)
            torch.testing.assert_close(codebook.decode(codes, outer).view(rows, -1), wanted)
