// deepen.h over the operations: memory is taken when a fusion is made, exceptions become statuses.
#include "embed/deepen.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "core/check.h"
#include "embed/map_data.h"
#include "embed/memory.h"
#include "ops/fuse.h"
#include "ops/topk_softmax.h"

using namespace deepen;

static_assert(int(DEEPEN_F32) == int(Dtype::f32) && int(DEEPEN_F16) == int(Dtype::f16) &&
                  int(DEEPEN_BF16) == int(Dtype::bf16),
              "the interface's dtypes are the core's");

struct deepen_map {
  std::shared_ptr<const MapData> data;
};

namespace {

// A row of logits that has no softmax.
struct NotFinite : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int64_t kMostRows = 4096;

// Not a std::string: after a std::bad_alloc there may be no memory for one.
thread_local char last_error[512] = "";

deepen_status failed(deepen_status status, const char* message) {
  std::strncpy(last_error, message, sizeof last_error - 1);
  return status;
}

template <class Work>
deepen_status guarded(const Work& work) {
  try {
    work();
    return DEEPEN_OK;
  } catch (const ArgumentError& error) {
    return failed(DEEPEN_INVALID_ARGUMENT, error.what());
  } catch (const NotFinite& error) {
    return failed(DEEPEN_NOT_FINITE, error.what());
  } catch (const FileError& error) {
    return failed(DEEPEN_BAD_FILE, error.what());
  } catch (const std::bad_alloc&) {
    return failed(DEEPEN_OUT_OF_MEMORY, "there is not enough memory; take a smaller batch or fewer members");
  } catch (const std::exception& error) {
    return failed(DEEPEN_FAILED, error.what());
  } catch (...) {
    return failed(DEEPEN_FAILED, "an unknown error");
  }
}

// What a member has in a fusion: its rows where the fusion runs, and room for its most probable tokens.
struct MemberMemory {
  std::shared_ptr<const MapData> map;  // on a CUDA device the rows are copied, and this is null
  Memory columns, values, rest;
  Memory ids, probs, tail, status;
  RelativeRows rows;
  int64_t k;
};

}  // namespace

struct deepen_fusion {
  deepen_settings settings;
  int64_t anchors;
  std::vector<MemberMemory> members;
  std::vector<TopkSoftmaxParams> topk;  // of a step; here so that a step allocates nothing
  Memory topk_workspace, fuse_workspace, fused, chosen;
};

static Backend backend_of(const deepen_settings& settings, void* stream) {
  return {settings.threads, settings.device, stream};
}

static void check_settings(const deepen_settings& settings) {
  DEEPEN_CHECK(settings.batch >= 1 && settings.batch <= kMostRows, "batch is ", settings.batch,
               "; choose 1 to ", kMostRows);
  DEEPEN_CHECK(settings.candidates >= 1, "candidates is ", settings.candidates, "; choose 1 or more");
  DEEPEN_CHECK(settings.threads >= 1, "threads is ", settings.threads, "; choose 1 or more");
  DEEPEN_CHECK(settings.device >= -1, "device is ", settings.device,
               "; choose a CUDA device, or -1 for the CPU");
  check_search_settings(settings.learning_rate, settings.steps, settings.min_probability);
}

static void take_rows(MemberMemory* member, const std::shared_ptr<const MapData>& map, int device) {
  if (device < 0) {
    member->map = map;
    member->rows = map->rows();
    return;
  }
  const auto copied = [device](const auto& values) {
    const size_t bytes = values.size() * sizeof values[0];
    Memory memory(device, bytes);
    memory.fill(values.data(), bytes);
    return memory;
  };
  member->values = copied(map->values);
  if (!map->dense()) {
    member->columns = copied(map->columns);
    member->rest = copied(map->rest);
  }
  member->rows = {member->columns.as<int32_t>(), member->values.as<float>(), member->rest.as<float>(),
                  map->vocab, map->entries};
}

static void make_fusion(const deepen_map* const* maps, int32_t count, const deepen_settings& settings,
                        deepen_fusion* fusion) {
  fusion->settings = settings;
  fusion->anchors = maps[0]->data->anchors;
  fusion->members.resize(size_t(count));
  fusion->topk.resize(size_t(count));
  const int device = settings.device;
  const int64_t batch = settings.batch;
  for (int32_t i = 0; i < count; ++i) {
    const auto& map = maps[i]->data;
    DEEPEN_CHECK(map->anchors == fusion->anchors, "member ", i, " has ", map->anchors,
                 " anchors, but the main model has ", fusion->anchors, "; save the maps of one ensemble");
    DEEPEN_CHECK(map->dense() == maps[0]->data->dense(), "members mix dense and sparse relative rows");
    MemberMemory& member = fusion->members[size_t(i)];
    take_rows(&member, map, device);
    member.k = std::min(settings.candidates, map->vocab);
    const auto room = [device](int64_t values) { return Memory(device, size_t(values) * 4); };
    member.ids = room(batch * member.k);
    member.probs = room(batch * member.k);
    member.tail = room(batch);
    member.status = room(batch);
    fusion->topk[size_t(i)] = {nullptr,
                               member.ids.as<int32_t>(),
                               member.probs.as<float>(),
                               member.tail.as<float>(),
                               member.status.as<int32_t>(),
                               batch,
                               map->vocab,
                               member.k,
                               Dtype::f32};
  }
  const Backend backend = backend_of(settings, nullptr);
  const MemberMemory& main = fusion->members[0];
  size_t topk = 0, fuse = 0;
  // A smaller batch may be cut into more pieces, and a narrower dtype into others.
  for (const Dtype dtype : {Dtype::f32, Dtype::f16}) {
    for (int64_t rows = 1; rows <= batch; ++rows) {
      for (auto& one : fusion->topk) one.batch = rows, one.dtype = dtype;
      topk = std::max(topk, topk_softmax_workspace(fusion->topk.data(), count, backend));
      fuse = std::max(fuse, fuse_workspace({nullptr, nullptr, nullptr, main.rows, main.k}, rows,
                                           fusion->anchors, backend));
    }
  }
  fusion->topk_workspace = Memory(device, topk);
  fusion->fuse_workspace = Memory(device, fuse);
  fusion->fused = Memory(device, size_t(batch * main.k) * 4);
  fusion->chosen = Memory(device, size_t(batch) * 4);
}

static void check_status(const deepen_fusion& fusion, int64_t batch) {
  for (size_t i = 0; i < fusion.members.size(); ++i) {
    const auto* status = fusion.members[i].status.as<int32_t>();
    for (int64_t row = 0; row < batch; ++row) {
      if (status[row] == kRowOk) continue;
      throw NotFinite("row " + std::to_string(row) + " of member " + std::to_string(i) +
                      (status[row] == kRowEmpty ? " has nothing but -infinity" : " has NaN or +infinity"));
    }
  }
}

static void step(deepen_fusion* fusion, int64_t batch, void* const* logits, const deepen_dtype* dtypes,
                 const float* weights, int32_t* chosen, void* stream) {
  const deepen_settings& settings = fusion->settings;
  DEEPEN_CHECK(batch >= 0 && batch <= settings.batch, "batch is ", batch, "; this fusion was made for 0 to ",
               settings.batch, " rows");
  const Backend backend = backend_of(settings, stream);
  FuseParams params{};
  for (size_t i = 0; i < fusion->members.size(); ++i) {
    DEEPEN_CHECK(logits[i] != nullptr, "the logits of member ", i, " are NULL");
    DEEPEN_CHECK(dtypes[i] >= DEEPEN_F32 && dtypes[i] <= DEEPEN_BF16, "the dtype of member ", i, " is ",
                 int(dtypes[i]), "; use DEEPEN_F32, DEEPEN_F16 or DEEPEN_BF16");
    TopkSoftmaxParams& topk = fusion->topk[i];
    topk.logits = logits[i];
    topk.batch = batch;
    topk.dtype = Dtype(dtypes[i]);
    params.members[i] = {topk.ids, topk.probs, topk.tail, fusion->members[i].rows, topk.k};
  }
  topk_softmax(fusion->topk.data(), int64_t(fusion->topk.size()), fusion->topk_workspace.as<void>(), backend);
  if (on_cpu(backend)) check_status(*fusion, batch);
  params.weights = weights;
  params.logits = logits[0];
  params.fused = fusion->fused.as<float>();
  params.chosen = chosen != nullptr ? chosen : fusion->chosen.as<int32_t>();
  params.workspace = fusion->fuse_workspace.as<void>();
  params.batch = batch;
  params.anchors = fusion->anchors;
  params.learning_rate = settings.learning_rate;
  params.min_probability = settings.min_probability;
  params.steps = settings.steps;
  params.member_count = int32_t(fusion->members.size());
  params.dtype = Dtype(dtypes[0]);
  params.log_probs = settings.log_probs != 0;
  fuse(params, backend);
}

extern "C" {

int32_t deepen_interface_version(void) { return DEEPEN_INTERFACE_VERSION; }

const char* deepen_error(void) { return last_error; }

deepen_settings deepen_default_settings(void) { return {1, 128, 0.15, 5, 1e-4f, 1, 1, -1}; }

deepen_status deepen_map_read(const char* path, deepen_map** map) {
  return guarded([&] {
    DEEPEN_CHECK(path != nullptr && map != nullptr, "path or map is NULL");
    *map = new deepen_map{std::make_shared<const MapData>(read_map(path))};
  });
}

deepen_status deepen_map_create(const int32_t* columns, const float* values, const float* rest, int64_t vocab,
                                int64_t entries, int64_t anchors, deepen_map** map) {
  return guarded([&] {
    DEEPEN_CHECK(columns != nullptr && values != nullptr && rest != nullptr && map != nullptr,
                 "columns, values, rest or map is NULL");
    DEEPEN_CHECK(vocab >= 1 && vocab <= kMost && anchors >= 1 && anchors <= kMost, "vocab is ", vocab,
                 ", anchors ", anchors, "; both must be 1 to ", kMost);
    DEEPEN_CHECK(entries >= 1 && entries <= anchors, "entries is ", entries,
                 "; choose 1 to the number of anchors, ", anchors);
    auto data = std::make_shared<MapData>();
    data->columns.assign(columns, columns + vocab * entries);
    data->values.assign(values, values + vocab * entries);
    data->rest.assign(rest, rest + vocab);
    data->vocab = vocab;
    data->entries = entries;
    data->anchors = anchors;
    try {
      check_rows(*data);
    } catch (const std::runtime_error& error) {
      DEEPEN_CHECK(false, error.what());
    }
    *map = new deepen_map{std::move(data)};
  });
}

int64_t deepen_map_vocab(const deepen_map* map) { return map->data->vocab; }
int64_t deepen_map_anchors(const deepen_map* map) { return map->data->anchors; }
void deepen_map_free(deepen_map* map) { delete map; }

deepen_status deepen_fusion_create(const deepen_map* const* maps, int32_t members,
                                   const deepen_settings* settings, deepen_fusion** fusion) {
  return guarded([&] {
    DEEPEN_CHECK(maps != nullptr && settings != nullptr && fusion != nullptr,
                 "maps, settings or fusion is NULL");
    DEEPEN_CHECK(members >= 1 && members <= kMaxMembers, "there are ", members, " members; 1 to ",
                 kMaxMembers, " are possible");
    for (int32_t i = 0; i < members; ++i)
      DEEPEN_CHECK(maps[i] != nullptr, "the map of member ", i, " is NULL");
    check_settings(*settings);
    auto made = std::make_unique<deepen_fusion>();
    make_fusion(maps, members, *settings, made.get());
    *fusion = made.release();
  });
}

deepen_status deepen_fusion_step(deepen_fusion* fusion, int64_t batch, void* const* logits,
                                 const deepen_dtype* dtypes, const float* weights, int32_t* chosen,
                                 void* stream) {
  return guarded([&] {
    DEEPEN_CHECK(fusion != nullptr && logits != nullptr && dtypes != nullptr && weights != nullptr,
                 "fusion, logits, dtypes or weights is NULL");
    step(fusion, batch, logits, dtypes, weights, chosen, stream);
  });
}

void deepen_fusion_free(deepen_fusion* fusion) { delete fusion; }

}  // extern "C"
