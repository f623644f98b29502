"""A run as a SageMaker training job: what it asks for, what runs inside it, and a rehearsal of it without AWS. Imports no torch."""
