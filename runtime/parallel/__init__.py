"""Many ranks as one executor: what a rank keeps and runs, its groups, and the control plane."""
