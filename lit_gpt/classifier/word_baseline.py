"""What words alone say: a logistic regression on TF-IDF weights, which needs no model.

Where it is as good as a classifier on a language model, the words are the answer, and the model is not worth its cost.
"""

import time

import numpy as np

from lit_gpt.classifier.scores import Scores, score_log_probabilities
from lit_gpt.classifier.texts import ClassifierData
from lit_gpt.packages import how_to_install, is_installed

BASELINE = "TF-IDF"
WORDS_ALONE = "words alone"
LEAST_LOG_PROBABILITY = -30.0  # scikit-learn's probabilities may round to 0, whose logarithm no file can hold


def can_count_words() -> bool:
    """Whether scikit-learn is there, which the baseline needs."""
    return is_installed("sklearn")


def no_baseline() -> str:
    """The line that says what is missing, if it is not."""
    return f"No comparison with words alone, as scikit-learn is missing: {how_to_install('sklearn', 'classify')}"


def word_baseline(data: ClassifierData, train: np.ndarray, scored: np.ndarray) -> Scores:
    """The scores of a logistic regression on the TF-IDF weights of words and pairs of words.

    `train` and `scored` are numbers of records. Each class has to be among those that train.
    """
    began = time.perf_counter()
    labelled = data.labelled
    all_labels = np.array(labelled.labels)
    train_texts = [labelled.texts[i] for i in train]
    scored_texts = [labelled.texts[i] for i in scored]
    log_probabilities, n_trained = words_to_classes(train_texts, all_labels[train], scored_texts)
    return score_log_probabilities(
        all_labels[scored],
        log_probabilities,
        ids=[data.ids[i] for i in scored],
        trained=n_trained,
        seconds=time.perf_counter() - began,
    )


def words_to_classes(train_texts: list[str], labels: np.ndarray, scored_texts: list[str]) -> tuple[np.ndarray, int]:
    """The log-probabilities (n, n_classes) of the scored texts, and the number of trained parameters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    # the weights of words, unless no word is in two texts: then nothing but the shares of the classes is known
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    try:
        words = vectorizer.fit_transform(train_texts)
    except ValueError:  # so scikit-learn 1.9 says that its vocabulary is empty
        shares = np.bincount(labels) / len(labels)
        return np.tile(np.log(shares), (len(scored_texts), 1)), len(shares)

    regression = LogisticRegression(C=10, max_iter=2000)
    regression.fit(words, labels)
    log_probabilities = regression.predict_log_proba(vectorizer.transform(scored_texts))
    n_trained = regression.coef_.size + regression.intercept_.size
    return np.maximum(log_probabilities, LEAST_LOG_PROBABILITY), n_trained
