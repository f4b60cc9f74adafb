"""Stage III: experts → one student (paper §3.2, Eq. 14), streamed tensor by tensor over safetensors.

folder.py   a model's safetensors, one file or many        read.py     the same, hashed in the pass that reads them
linear.py   Eq. 14, tensors of the experts → one           methods.py  TIES, DARE and others, over task vectors
weights.py  λ by expert and part                           verify.py   whether the experts belong together
write.py    the merged folder, whole or not at all         search.py   λ by validation
candidates.py  what a search tries                         table.py    what it found, as text and figure
measure.py  what a merge is worth, before it is written    stage.py    the `merge` stage
"""

from xlstm_distill.merge.folder import Entry, ModelFolder

__all__ = ["Entry", "ModelFolder"]
