"""The quickstarts' data: tasks for sft, stories for pt, judged words for rm, dpo, kto; and what makes them."""
