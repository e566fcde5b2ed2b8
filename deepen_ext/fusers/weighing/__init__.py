"""Who counts how much at a token, by what the members say there.

| rule | a member counts more | source |
| --- | --- | --- |
| confidence | the lower its entropy; at strength 0 as its weight says | ours |
| margin | the farther its first choice is ahead of its second | ours |
| consistency | the lower its entropy; the main model at least half | CoRE, Zeng et al., arXiv 2510.13855 |
| disagreement | where all are unsure and differ; elsewhere main writes alone | SAFE, arXiv 2510.15346 |
| gate | by four numbers that `deepen-ext tune --gate` has fitted | ours |

A new rule is a file here with one class, which make.py lists. Every fuser can have every rule.
"""
