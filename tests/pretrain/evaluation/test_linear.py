"""Linear and logistic classifiers find what scikit-learn finds on the same features."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pretrain.evaluation.features import Features
from pretrain.evaluation.knn import knn_classify
from pretrain.evaluation.linear import Choice, HeadGroup, LinearSettings, linear_probe
from pretrain.evaluation.logistic import LogisticSettings, fit, logistic_regression

HALF_A_POINT = 0.005


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made_up(seed: int = 0) -> tuple[Features, Features]:
    """Ten overlapping classes in 32 dimensions, 2,000 rows to learn and 4,000 to test."""
    x, y = make_classification(
        6000, 32, n_informative=12, n_redundant=8, n_classes=10, class_sep=1.5, random_state=seed
    )
    return split(x / x.std(), y, 2000)


def digits() -> tuple[Features, Features]:
    x, y = load_digits(return_X_y=True)
    return split(x / 16, y, 900)


def named(rows: torch.Tensor, labels: list[str]) -> Features:
    return Features(rows, labels, [str(i) for i in range(len(labels))])


def split(x: np.ndarray, y: np.ndarray, count: int) -> tuple[Features, Features]:
    rows, labels = torch.from_numpy(x).float(), [str(label) for label in y]
    return named(rows[:count], labels[:count]), named(rows[count:], labels[count:])


def accuracy_of(model: object, train: Features, test: Features) -> float:
    model.fit(train.rows.numpy(), train.labels)  # type: ignore[attr-defined]
    return float(model.score(test.rows.numpy(), test.labels))  # type: ignore[attr-defined]


@pytest.mark.parametrize("data", [made_up, digits])
def test_linear_probe__agrees_with_scikit_learn(data) -> None:
    train, test = data()
    settings = LinearSettings(
        steps=1500, batch_size=128, learning_rates=(0.01, 0.03, 0.1, 0.3, 1.0)
    )
    ours = linear_probe([train], test, settings, "cpu")["linear"]
    strengths = np.logspace(-2, 3, 6)
    theirs = [accuracy_of(LogisticRegression(C=c, max_iter=1000), train, test) for c in strengths]
    assert ours == pytest.approx(max(theirs), abs=HALF_A_POINT)


@pytest.mark.parametrize("data", [made_up, digits])
def test_logistic_regression__agrees_with_scikit_learn(data) -> None:
    train, test = data()
    found = logistic_regression(train, test, LogisticSettings(strengths=(-2, 2, 5)), "cpu")
    strength = 10 ** found["log10_C"]
    theirs = accuracy_of(LogisticRegression(C=strength, tol=1e-8, max_iter=5000), train, test)
    assert found["logreg"] == pytest.approx(theirs, abs=HALF_A_POINT)


def test_fit__is_scikit_learn_s_minimum() -> None:
    train, _ = made_up()
    labels = torch.tensor([int(label) for label in train.labels])
    weights = fit(train.rows.double(), labels, 10, 0.1, LogisticSettings())
    model = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000)
    model.fit(train.rows.numpy().astype(np.float64), labels.numpy())
    assert np.abs(weights[:, :-1].numpy() - model.coef_).max() < 1e-3


@pytest.mark.parametrize("data", [made_up, digits])
def test_knn__agrees_with_scikit_learn(data) -> None:
    train, test = data()
    names = sorted(set(train.labels))
    numbers = torch.tensor([names.index(label) for label in train.labels])
    guess = knn_classify(train.rows, numbers, test.rows, k=(20,))[20]
    ours = np.mean([names[g] == label for g, label in zip(guess, test.labels, strict=True)])

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    model = KNeighborsClassifier(20, metric="cosine", weights=weights, algorithm="brute")
    assert ours == pytest.approx(accuracy_of(model, train, test), abs=HALF_A_POINT)


def test_head_group__follows_torch_s_own_sgd() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(12, 5), torch.randint(0, 3, (12,))
    group = HeadGroup(Choice(1, pooled=False), 5, 3, torch.tensor([0.1, 0.7]), seed=0)
    weights = [group.weight[i].clone().requires_grad_(True) for i in range(2)]
    optimizers = [
        torch.optim.SGD([w], lr, momentum=0.9) for w, lr in zip(weights, (0.1, 0.7), strict=True)
    ]
    for _ in range(5):
        group.bias.zero_()
        group.step(x, labels, share=0.5)
        for weight, optimizer, lr in zip(weights, optimizers, (0.1, 0.7), strict=True):
            optimizer.param_groups[0]["lr"] = 0.5 * lr
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(x @ weight.T, labels).backward()
            optimizer.step()
    for i, weight in enumerate(weights):
        torch.testing.assert_close(group.weight[i], weight.detach())


def test_linear_probe__grid_over_layers_and_pooling() -> None:
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    useful = torch.eye(4)[labels] + 0.3 * torch.randn(200, 4)
    tokens = torch.randn(200, 4, 4)  # (N, n + 1, D): 3 layers and the mean patch
    tokens[:, -1] = useful
    rows = named(tokens[:100].half(), [str(label) for label in labels[:100].tolist()])
    test = named(tokens[100:].half(), [str(label) for label in labels[100:].tolist()])
    settings = LinearSettings(layers=(1, 3), steps=300, learning_rates=(0.1, 1.0))
    found = linear_probe([rows, rows], test, settings, "cpu")
    assert found["linear (layers 1)"] < 0.5 < 0.8 < found["linear (layers 1, mean patch)"]
    assert found["best_mean_patch"] == 1.0
    assert found["linear"] == max(
        value for name, value in found.items() if "layers" in name and name.startswith("linear")
    )


def test_linear_probe__classes_that_no_one_taught_are_wrong() -> None:
    train = named(torch.eye(2).repeat(4, 1), ["a", "b"] * 4)
    test = named(torch.eye(2), ["a", "zebra"])
    settings = LinearSettings(steps=50, learning_rates=(1.0,), batch_size=8)
    assert linear_probe([train], test, settings, "cpu")["linear"] == 0.5
