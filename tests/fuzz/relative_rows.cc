// relative_rows of hostile embeddings: rows that are distributions over the anchors, or a status; ids outside
// the embedding and sizes that cannot be are refused before anything is read.
#include "ops/relative_rows.h"

#include <vector>

#include "core/check.h"
#include "input.h"
#include "ops/topk_softmax.h"

using namespace deepen;
using fuzz::Buffer;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  in.choose_isa();
  const int64_t vocab = 1 + in.below(30), dim = 1 + in.below(40), anchors = 1 + in.below(40);
  const int64_t count = in.one_in(64) ? 60 + in.below(20) : in.below(6), entries = 1 + in.below(anchors);
  const Dtype dtype = in.dtype();
  Buffer<float> values(vocab * dim), inverse_norm(anchors), mean(dim);
  in.logits(&values);
  Buffer<char> embedding = fuzz::stored(&values, dtype);
  Buffer<int64_t> tokens(count), anchor_ids(anchors);
  for (int64_t n = 0; n < count; ++n) tokens[n] = in.below(vocab);
  for (int64_t a = 0; a < anchors; ++a) anchor_ids[a] = (3 * a + 1) % vocab;
  const bool centred = in.one_in(2);
  if (centred && in.one_in(2)) in.logits(&mean);
  for (int64_t a = 0; a < anchors; ++a) {
    double square = 0;
    for (int64_t i = 0; i < dim; ++i) {
      const double value = double(values[anchor_ids[a] * dim + i]) - double(centred ? mean[i] : 0.0f);
      square += value * value;
    }
    inverse_norm[a] = square > 0 ? float(1 / std::sqrt(square)) : 0.0f;
  }
  if (in.one_in(8)) in.logits(&inverse_norm);
  Buffer<int32_t> columns(count * entries), status(count);
  Buffer<float> found(count * entries), rest(count);
  RelativeRowsParams params{embedding.data(),
                            tokens.data(),
                            anchor_ids.data(),
                            centred ? mean.data() : nullptr,
                            inverse_norm.data(),
                            columns.data(),
                            found.data(),
                            rest.data(),
                            status.data(),
                            nullptr,
                            vocab,
                            dim,
                            count,
                            anchors,
                            entries,
                            20.0f,
                            in.one_in(2),
                            dtype};
  const int64_t number = in.no_size();
  bool broken = true;
  switch (in.below(16) - 8) {
    case 0: params.count = number < 0 ? number : -1; break;
    case 1: params.anchors = number; break;
    case 2: params.dim = number; break;
    case 3: params.entries = in.one_in(2) ? anchors + 1 : number; break;
    case 4: params.temperature = -1.0f; break;
    case 5: params.temperature = NAN; break;
    case 6:
      if (count == 0) return 0;
      tokens[0] = number == 0 ? vocab : number;
      break;
    case 7:
      anchor_ids[anchors - 1] = number == 0 ? vocab : number;
      broken = count > 0;
      break;
    default: broken = false;
  }
  const Backend backend{in.one_in(16) ? 2 : 1, -1, nullptr};
  try {
    Buffer<char> workspace(
        int64_t(relative_rows_workspace(params.dim, params.anchors, params.entries, params.count, backend)));
    params.workspace = workspace.data();
    ++fuzz::calls.count;
    relative_rows(params, backend);
    PROMISED(!broken);
  } catch (const ArgumentError&) {
    PROMISED(broken);
    return 0;
  }
  for (int64_t n = 0; n < count; ++n) {
    if (status[n] != kRowOk) continue;
    std::vector<bool> seen(static_cast<size_t>(anchors));
    double sum = double(rest[n]);
    PROMISED(rest[n] >= 0);
    for (int64_t j = 0; j < entries; ++j) {
      const int32_t column = columns[n * entries + j];
      const float value = found[n * entries + j];
      PROMISED(column >= 0 && column < anchors && !seen[size_t(column)]);
      seen[size_t(column)] = true;
      PROMISED(value >= 0 && (j == 0 || value <= found[n * entries + j - 1]));
      sum += double(value);
    }
    PROMISED(std::fabs(sum - 1) <= 1e-4);
  }
  return 0;
}
