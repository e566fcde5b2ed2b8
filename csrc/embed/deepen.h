/* deepen-ext's fusion step for programs in other languages: no Python, no framework, no exceptions.
 *
 *   deepen_map* maps[2];
 *   deepen_map_read("main.map", &maps[0]);            the members' relative maps, the main model's first
 *   deepen_map_read("assistant.map", &maps[1]);
 *   deepen_settings settings = deepen_default_settings();
 *   deepen_fusion* fusion;
 *   deepen_fusion_create((const deepen_map* const*)maps, 2, &settings, &fusion);
 *   for each token:
 *     void* logits[2] = {main_logits, assistant_logits};
 *     deepen_fusion_step(fusion, 1, logits, dtypes, weights, &chosen, NULL);
 *
 * A step is DeePEn's (Huang et al., NeurIPS 2024, arXiv 2404.12715, sections 3.2 to 3.4): each member's most
 * probable tokens go to relative space, are averaged there, and a short search moves the main model's logits
 * there.
 *
 * Every function that can fail returns a status; `deepen_error` then says what was wrong and what to do. A
 * step on the CPU allocates nothing. A fusion serves one thread at a time; maps may be shared by any number
 * of fusions.
 */
#ifndef DEEPEN_H
#define DEEPEN_H

#include <stdint.h>

#if defined(_WIN32)
#define DEEPEN_API
#else
#define DEEPEN_API __attribute__((visibility("default")))
#endif

/* Grows when a struct or a function here changes. Compare it with deepen_interface_version(). */
#define DEEPEN_INTERFACE_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum deepen_status {
  DEEPEN_OK = 0,
  DEEPEN_INVALID_ARGUMENT = 1, /* an argument is wrong */
  DEEPEN_NOT_FINITE = 2,       /* a row of logits has NaN, +infinity, or nothing but -infinity */
  DEEPEN_BAD_FILE = 3,         /* a file cannot be read, or is no whole relative map */
  DEEPEN_OUT_OF_MEMORY = 4,
  DEEPEN_FAILED = 5 /* anything else, such as an error of CUDA */
} deepen_status;

typedef enum deepen_dtype { DEEPEN_F32 = 0, DEEPEN_F16 = 1, DEEPEN_BF16 = 2 } deepen_dtype;

/* A member's relative row for each of its tokens. */
typedef struct deepen_map deepen_map;

/* Steps of the same members with the same settings, and the memory that they work in. */
typedef struct deepen_fusion deepen_fusion;

typedef struct deepen_settings {
  int64_t batch;         /* most rows of a step, 1 to 4096 */
  int64_t candidates;    /* most probable tokens of each member that count, 1 or more */
  double learning_rate;  /* of the search, above 0 */
  int32_t steps;         /* of the search, 0 to 64 */
  float min_probability; /* less probable tokens count as part of their member's rest, 0 to below 1 */
  int32_t log_probs; /* 1: the search runs on log-probabilities; 0: on the logits as they are (the paper) */
  int32_t threads;   /* on the CPU, for the rows of a batch; 1 or more */
  int32_t device;    /* a CUDA device, or -1 for the CPU */
} deepen_settings;

/* The interface's version that the library was built with. */
DEEPEN_API int32_t deepen_interface_version(void);

/* What went wrong in this thread's last call that failed; "" before. Holds until this thread's next failure.
 */
DEEPEN_API const char* deepen_error(void);

/* Those of the Python package: batch 1, 128 candidates, 0.15, 5 steps, 1e-4, log-probabilities, one thread,
 * CPU. */
DEEPEN_API deepen_settings deepen_default_settings(void);

/* A map that `RelativeMap.save` of the Python package has written, with all its rows (`fill`). */
DEEPEN_API deepen_status deepen_map_read(const char* path, deepen_map** map);

/* A map of rows that the caller has; they are copied.
 *
 * columns: [vocab, entries] anchors, all different within a row, -1 after a row's last
 * values:  [vocab, entries] what each has, sorted down
 * rest:    [vocab] what the anchors share that the row does not name; with its values a row sums to 1
 * vocab and anchors: 1 to 2^22; entries: 1 to anchors
 */
DEEPEN_API deepen_status deepen_map_create(const int32_t* columns, const float* values, const float* rest,
                                           int64_t vocab, int64_t entries, int64_t anchors, deepen_map** map);

DEEPEN_API int64_t deepen_map_vocab(const deepen_map* map);
DEEPEN_API int64_t deepen_map_anchors(const deepen_map* map);

/* Fusions of the map keep its rows. NULL is allowed, here and below. */
DEEPEN_API void deepen_map_free(deepen_map* map);

/* maps: of each of 1 to 16 members, the main model's first; all with the same anchors. */
DEEPEN_API deepen_status deepen_fusion_create(const deepen_map* const* maps, int32_t members,
                                              const deepen_settings* settings, deepen_fusion** fusion);

/* One step for each row of a batch.
 *
 * logits:  of each member [batch, its vocab], contiguous. logits[0] is replaced by the fused ones.
 * dtypes:  of each member's logits
 * weights: [batch, members], each row sums to 1. A weight of 0 leaves a member out of that row
 * chosen:  [batch] the most probable token of each row; NULL where nobody asks
 * stream:  a cudaStream_t; NULL for the default stream, and on the CPU
 *
 * On a CUDA device logits, weights and chosen are in its memory, `dtypes` and the list `logits` are not. The
 * step is launched and not waited for, so a row that is not finite is not reported: its results mean nothing.
 *
 * After an error on the CPU logits[0] is as it was.
 */
DEEPEN_API deepen_status deepen_fusion_step(deepen_fusion* fusion, int64_t batch, void* const* logits,
                                            const deepen_dtype* dtypes, const float* weights, int32_t* chosen,
                                            void* stream);

DEEPEN_API void deepen_fusion_free(deepen_fusion* fusion);

#ifdef __cplusplus
}
#endif
#endif
