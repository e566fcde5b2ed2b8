// In place of the CUDA part where it is not built: every entry fails when it is called, with the cure.
#include "core/check.h"
#include "core/cuda_device.h"
#include "ops/fuse.h"
#include "ops/inverse_search.h"
#include "ops/relative_rows.h"
#include "ops/topk_softmax.h"

namespace deepen {

[[noreturn]] static void absent() {
  throw_argument_error(
      __FILE__, __LINE__,
      "this build of deepen-ext has no CUDA part; install the CUDA toolkit (nvcc) and build again "
      "with DEEPEN_CUDA=ON");
}

bool cuda_compiled() { return false; }
int cuda_device_count() { return 0; }
void* allocate_on_device(int, size_t) { absent(); }
void copy_to_device(int, void*, const void*, size_t) { absent(); }
void free_on_device(int, void*) noexcept {}

size_t topk_softmax_cuda_workspace(const TopkSoftmaxParams*, int64_t) { absent(); }
void topk_softmax_cuda(const TopkSoftmaxParams*, int64_t, void*, const Backend&) { absent(); }
size_t relative_rows_cuda_workspace(int64_t, int64_t, int64_t, int64_t, const Backend&) { absent(); }
void relative_rows_cuda(const RelativeRowsParams&, const Backend&) { absent(); }
size_t inverse_search_cuda_workspace(const RelativeRows&, int64_t, int64_t, int64_t) { absent(); }
void inverse_search_cuda(const InverseSearchParams&, const AdamStep*, const Backend&) { absent(); }
size_t fuse_cuda_workspace(const FuseMember&, int64_t, int64_t) { absent(); }
void fuse_cuda(const FuseParams&, const AdamStep*, const Backend&) { absent(); }

}  // namespace deepen
