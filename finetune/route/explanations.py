"""What the measures mean, as the page says it."""

MEASURES = {
    "load": "The share of a layer's assignments that each expert got. A token sent to two experts makes two.",
    "entropy": "The entropy of the load, divided by the logarithm of the number of experts that are open to these "
    "tokens: 1 when every expert gets the same, 0 when one gets everything.",
    "dead experts": "Experts that are open to these tokens and got none of them.",
    "top probability": "The mean over tokens of the router's largest probability, its confidence: 1 / experts when it "
    "does not care, near 1 when it is saturated. Tokens with one open expert are left out.",
    "similarity": "The mean cosine of two experts' weights, all of an expert's weights as one vector: 1 for copies.",
    "distance": "The mean distance of two experts' weights, divided by their mean norm: 0 for copies. It tells "
    "experts apart where the cosine is 1 within rounding.",
    "co-activation": "Of the tokens that went to the expert of the row, the share that also went to the expert of the "
    "column.",
    "specialisation": "How much a token's expert tells about the label of its sample, or about the class of the word: "
    "the mutual information of the two, divided by the geometric mean of their entropies, 0 to 1. Beside it what "
    "chance gives: the mean of 20 shufflings, of labels over samples, or of words over assignments.",
    "word class": "special: special tokens; template: what the chat template writes around messages; digits; "
    "punctuation; function: English function words; capitalised: other words that begin with a capital; other.",
}
