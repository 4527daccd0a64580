"""What a run leaves for people to read: a page and a model card, made from the numbers in ptq_report.json."""
