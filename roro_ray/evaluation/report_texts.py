"""What the report says round its figures, as HTML."""

from __future__ import annotations

FRONTIER = """
<h2>The frontier</h2>
<p>Up and to the left is better: more right answers with fewer steps by the large model. A ring is a method's
operating point: the cheapest setting that came within reach of the large model's accuracy on validation. A line
joins the settings that were worth using on validation; faint dots are the others.</p>
"""

TABLE = """
<h2>All methods at their operating points</h2>
<p>Large share is the share of steps that the large model writes. Frontier area and APGR describe the whole line:
the area under it, and the part of the gap between the two models that it recovers on average. CPT 95 is the least
large share at which it recovers 95% of that gap.</p>
"""

CURVES = """
<h2>How fast the routers learn</h2>
<p>Each point is a router as it was after so many training episodes, swept over a few cost weights and read by the
operating rule, on validation queries.</p>
"""

JUDGE = """
<h2>Does the Judge know the better trajectory?</h2>
<p>Of two trajectories of one held-out query, how often the preferred one scores higher under the query's rubric.
The controls tell what the rubric is worth: if another query's rubric did as well, the rubric would not matter.</p>
"""

EXAMPLES = """
<h2>Examples</h2>
<p>Chosen by a rule: per suite the first test query that the small model alone gets wrong and RoRo right, then the
first two that RoRo gets wrong although the large model alone is right. Blue steps are written by the small model,
red ones by the large. The bar is the router's probability of the large model.</p>
"""

COSTS = """
<h2>What is counted as cost</h2>
<p><b>FLOPs</b> are 2 &times; parameters for every token that a model decodes or reads, for every model touched: the
text that a writer has not seen yet when it takes over, drafts that are thrown away, the drafts that a verifier
reads, and the router itself. Each model keeps its cache, so that no token is read twice.</p>
<p><b>Decoded FLOPs</b>, the convention of most papers, count written tokens only; a method that peeks or verifies
looks cheaper by them than it is. <b>USD</b>, where the pool's models have prices, are for tokens read, sent again with
every step and written. <b>Large share</b> counts steps and nothing else. The oracle is charged for the
solution that it found, not for its search.</p>
"""

ALL_WELL = "<p>No rollout failed, every answer could be scored, and no method was left out.</p>"
DROPPED = "<p>Dropped rollouts take part in no mean; they are not counted as wrong.</p>"
