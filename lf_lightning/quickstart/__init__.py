"""The quickstarts' data: a small task set for sft and little stories for pt, and the script that makes them."""
