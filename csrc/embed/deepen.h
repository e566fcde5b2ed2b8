/** @file
 * deepen-ext's fusion step for programs in other languages: no Python, no framework, no exceptions.
 *
 * @code
 *   deepen_map* maps[2];
 *   deepen_map_read("main.map", &maps[0]);            the members' relative maps, the main model's first
 *   deepen_map_read("assistant.map", &maps[1]);
 *   deepen_settings settings = deepen_default_settings();
 *   deepen_fusion* fusion;
 *   deepen_fusion_create((const deepen_map* const*)maps, 2, &settings, &fusion);
 *   for each token:
 *     void* logits[2] = {main_logits, assistant_logits};
 *     deepen_fusion_step(fusion, 1, logits, dtypes, weights, &chosen, NULL);
 * @endcode
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

/** Grows when a struct or a function here changes. Compare it with deepen_interface_version(). */
#define DEEPEN_INTERFACE_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/** What a function came to; deepen_error() has the words. */
typedef enum deepen_status {
  DEEPEN_OK = 0,               /**< done */
  DEEPEN_INVALID_ARGUMENT = 1, /**< an argument is wrong */
  DEEPEN_NOT_FINITE = 2,       /**< a row of logits has NaN, +infinity, or nothing but -infinity */
  DEEPEN_BAD_FILE = 3,         /**< a file cannot be read, or is no whole relative map */
  DEEPEN_OUT_OF_MEMORY = 4,    /**< the caller's memory is as it was */
  DEEPEN_FAILED = 5            /**< anything else, such as an error of CUDA */
} deepen_status;

/** Of logits. */
typedef enum deepen_dtype {
  DEEPEN_F32 = 0, /**< float */
  DEEPEN_F16 = 1, /**< IEEE half precision */
  DEEPEN_BF16 = 2 /**< bfloat16 */
} deepen_dtype;

/** A member's relative row for each of its tokens. */
typedef struct deepen_map deepen_map;

/** Steps of the same members with the same settings, and the memory that they work in. */
typedef struct deepen_fusion deepen_fusion;

/** How a fusion works; deepen_default_settings() has the defaults. */
typedef struct deepen_settings {
  int64_t batch;         /**< most rows of a step, 1 to 4096 */
  int64_t candidates;    /**< most probable tokens of each member that count, 1 or more */
  double learning_rate;  /**< of the search, above 0 to 10 */
  int32_t steps;         /**< of the search, 0 to 64 */
  float min_probability; /**< less probable tokens count as part of their member's rest, 0 to below 1 */
  int32_t log_probs; /**< 1: the search runs on log-probabilities; 0: on the logits as they are (the paper) */
  int32_t threads;   /**< on the CPU, for the rows of a batch; 1 or more */
  int32_t device;    /**< a CUDA device, or -1 for the CPU */
} deepen_settings;

/** @return the DEEPEN_INTERFACE_VERSION that the library was built with */
DEEPEN_API int32_t deepen_interface_version(void);

/** @return what went wrong in this thread's last call that failed, and what to do; "" before. Holds until
 * this thread's next failure. */
DEEPEN_API const char* deepen_error(void);

/** @return the Python package's: batch 1, 128 candidates, learning rate 0.15, 5 steps, least probability
 * 1e-4, log-probabilities, one thread, CPU */
DEEPEN_API deepen_settings deepen_default_settings(void);

/** Reads a map that `RelativeMap.save` of the Python package has written, with all its rows (`fill`).
 *
 * @param[in] path  the file
 * @param[out] map  free it with deepen_map_free(); as it was after an error
 * @return DEEPEN_BAD_FILE for a file that cannot be read, is damaged or has not all rows
 */
DEEPEN_API deepen_status deepen_map_read(const char* path, deepen_map** map);

/** Makes a map of rows that the caller has; they are copied.
 *
 * @param[in] columns  [vocab, entries] anchors, all different within a row, -1 after a row's last
 * @param[in] values   [vocab, entries] what each has, sorted down
 * @param[in] rest     [vocab] the anchors' share that a row does not name; with the values a row sums to 1
 * @param vocab        tokens of the member, 1 to 2^22
 * @param entries      most anchors of a row, 1 to anchors
 * @param anchors      of all members, 1 to 2^22
 * @param[out] map     free it with deepen_map_free(); as it was after an error
 */
DEEPEN_API deepen_status deepen_map_create(const int32_t* columns, const float* values, const float* rest,
                                           int64_t vocab, int64_t entries, int64_t anchors, deepen_map** map);

/** @return the tokens of the map's member */
DEEPEN_API int64_t deepen_map_vocab(const deepen_map* map);
/** @return how many anchors the rows are over */
DEEPEN_API int64_t deepen_map_anchors(const deepen_map* map);

/** Frees a map, or does nothing for NULL. Fusions of the map keep its rows. */
DEEPEN_API void deepen_map_free(deepen_map* map);

/** Takes all memory that steps of these members need.
 *
 * @param[in] maps      of each member, the main model's first; all with the same anchors
 * @param members       1 to 16
 * @param[in] settings  copied
 * @param[out] fusion   free it with deepen_fusion_free(); as it was after an error
 */
DEEPEN_API deepen_status deepen_fusion_create(const deepen_map* const* maps, int32_t members,
                                              const deepen_settings* settings, deepen_fusion** fusion);

/** One step for each row of a batch.
 *
 * @param fusion           serves one thread at a time
 * @param batch            rows, 1 to settings.batch
 * @param[in,out] logits   of each member [batch, its vocab], contiguous; logits[0] becomes the fused ones
 * @param[in] dtypes       of each member's logits
 * @param[in] weights      [batch, members], each row sums to 1; a weight of 0 leaves a member out of that row
 * @param[out] chosen      [batch] the most probable token of each row; NULL where nobody asks
 * @param stream           a cudaStream_t; NULL for the default stream, and on the CPU
 *
 * On a CUDA device logits, weights and chosen are in its memory, `dtypes` and the list `logits` are not. The
 * step is launched and not waited for, so a row that is not finite is not reported: its results mean nothing.
 * All steps of a fusion work in the same memory: a step on another stream must wait for the step before, or
 * needs a fusion of its own.
 *
 * After an error on the CPU logits[0] is as it was.
 */
DEEPEN_API deepen_status deepen_fusion_step(deepen_fusion* fusion, int64_t batch, void* const* logits,
                                            const deepen_dtype* dtypes, const float* weights, int32_t* chosen,
                                            void* stream);

/** Frees a fusion, or does nothing for NULL. Steps that a device has not ended must be waited for. */
DEEPEN_API void deepen_fusion_free(deepen_fusion* fusion);

#ifdef __cplusplus
}
#endif
#endif
